"""The first difference between two pieces, in words.

A piece is compared call by call in the order in which it runs, so what is found is the first place where the two part,
with the source line that it comes from. Knows programs and nothing of bundles or layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from piecework.ops.ir.program import Call, TensorSpec
from piecework.report.listing import (
    Absent,
    Listing,
    argument_label,
    reference_kind,
    show_constant,
    show_dims,
    show_operator,
    show_value,
)


@dataclass(frozen=True)
class Difference:
    """Where two pieces part.

    Args:
        text: what differs, the first piece's against the second's.
        call: number of the call where they do, counted from 1; None where it is none of the calls.
        locations: source lines of that call in both, "" where they aren't known.
    """

    text: str
    call: int | None = None
    locations: tuple[str, str] = ("", "")


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """Return the first difference between two programs in words, or None where they are equal.

    Args:
        a, b: `Program.to_json()`, with any of the keys "locations" (one "file.py:12" per call), "names" (one per
            constant), "sizes" ({"s0": "tokens"}), "arguments" ({"aten.add.Tensor": ["self", "other"]}) and "primary"
            ("s0") added.

    Raises KeyError, TypeError, ValueError for what isn't the JSON of a program.
    """
    found = find_difference(Listing.from_json(a), Listing.from_json(b))
    return None if found is None else found.text


def find_difference(a: Listing, b: Listing) -> Difference | None:
    """Return the first difference between two pieces, or None where they are equal."""
    calls = len(a.program.calls), len(b.program.calls)
    counts = "" if calls[0] == calls[1] else f"different number of operators: {calls[0]} against {calls[1]}; "
    for number in range(min(calls)):
        text = _Walk(a, b, number).difference()
        if text is not None:
            at, places = _at(a, b, number)
            if counts and not text.startswith("call "):
                text = f"call {number + 1}: {text}"
            return Difference(f"{counts}{'the first that differs is ' if counts else ''}{text}{at}", number + 1, places)
    if counts:
        more, which = (a, "former") if calls[0] > calls[1] else (b, "latter")
        extra = more.program.calls[min(calls)]
        at, places = _at(a, b, min(calls))
        same = f"the first {min(calls)} are the same, then comes" if min(calls) else "the first is"
        return Difference(f"{counts}{same} {show_operator(extra)} in the {which}{at}", min(calls) + 1, places)
    text = _outside_of_calls(a, b)
    return None if text is None else Difference(text)


class _Walk:
    """Compares one call of two pieces; all calls before it are the same."""

    def __init__(self, a: Listing, b: Listing, number: int) -> None:
        self._a, self._b = a, b
        self._number = number
        self._calls = a.program.calls[number], b.program.calls[number]

    def difference(self) -> str | None:
        mine, theirs = self._calls
        if mine.target != theirs.target:
            return f"call {self._number + 1}: {_against(show_operator(mine), show_operator(theirs))}"
        for label, x, y in _paired_arguments(mine, theirs, names=self._a.arguments.get(mine.target, ())):
            found = self._value(x, y, label=label)
            if found is not None:
                return found
        return None

    def _value(self, x: Any, y: Any, *, label: str) -> str | None:
        if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)) and len(x) == len(y):
            found = (self._value(p, q, label=label) for p, q in zip(x, y, strict=True))
            return next((text for text in found if text is not None), None)
        if _same(x, y):
            return self._tensor(x) if isinstance(x, Mapping) else None
        where = f"{label} of {show_operator(self._calls[0])}"
        if reference_kind(x) or reference_kind(y) or isinstance(x, Absent) or isinstance(y, Absent):
            mine, theirs = show_value(x, self._a), show_value(y, self._b)
            return f"call {self._number + 1}: {where} is {_against(mine, theirs)}"
        return f"constant {_against(show_value(x, self._a), show_value(y, self._b))} in {where}"

    def _tensor(self, reference: Mapping[str, Any]) -> str | None:
        """Compare the tensors that an equal reference stands for."""
        kind = reference_kind(reference)
        if kind not in ("c", "i"):
            return None
        index = reference[kind]
        specs = [(p.constants if kind == "c" else p.inputs)[index] for p in (self._a.program, self._b.program)]
        difference = _spec_difference(specs[0], specs[1], a=self._a, b=self._b)
        if difference is None:
            return None
        name = show_constant(index, self._a, self._b) if kind == "c" else f"input {index + 1}"
        return f"{difference} of {name} used by {show_operator(self._calls[0])}"


def _paired_arguments(mine: Call, theirs: Call, *, names: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yield every argument of two calls of one operator: its label, and both values."""
    for index in range(max(len(mine.args), len(theirs.args))):
        x, y = (call.args[index] if index < len(call.args) else Absent() for call in (mine, theirs))
        yield argument_label(index, names=names), x, y
    for name in [*mine.kwargs, *(n for n in theirs.kwargs if n not in mine.kwargs)]:
        yield f"argument {name}", mine.kwargs.get(name, Absent()), theirs.kwargs.get(name, Absent())


def _same(x: Any, y: Any) -> bool:
    # 1 == True == 1.0 and 0.0 == -0.0 in Python, but not in a program
    return type(x) is type(y) and (repr(x) == repr(y) if isinstance(x, float) else bool(x == y))


def _spec_difference(x: TensorSpec, y: TensorSpec, *, a: Listing, b: Listing) -> str | None:
    for what, mine, theirs in (("shape", x.shape, y.shape), ("stride", x.stride, y.stride)):
        if mine != theirs:
            named = show_dims(mine, a.sizes), show_dims(theirs, b.sizes)
            raw = show_dims(mine, {}), show_dims(theirs, {})
            return f"{what} {_against(*(named if named[0] != named[1] else raw))}"
    for what, is_, other in (("dtype", x.dtype, y.dtype), ("device", x.device, y.device)):
        if is_ != other:
            return f"{what} {_against(is_, other)}"
    if x.aligned != y.aligned:
        return f"alignment to 64 bytes {_against('yes' if x.aligned else 'no', 'yes' if y.aligned else 'no')}"
    return None


def _outside_of_calls(a: Listing, b: Listing) -> str | None:
    """Compare what no call shows: results, sizes, and tensors that only carry a size."""
    p, q = a.program, b.program
    if len(p.outputs) != len(q.outputs):
        return f"different number of results: {_against(len(p.outputs), len(q.outputs))}"
    for number, (x, y) in enumerate(zip(p.outputs, q.outputs, strict=True)):
        if not _same(x, y):
            return f"result {number + 1} is {_against(show_value(x, a), show_value(y, b))}"
    if len(p.inputs) != len(q.inputs):
        return f"different number of inputs: {_against(len(p.inputs), len(q.inputs))}"
    for number, (given, other) in enumerate(zip(p.inputs, q.inputs, strict=True)):
        if difference := _spec_difference(given, other, a=a, b=b):
            return f"{difference} of input {number + 1}"
    for (symbol, low, high), (_, low2, high2) in zip(p.symbols, q.symbols, strict=False):
        if (low, high) != (low2, high2):
            return f"size {a.sizes.get(symbol, symbol)} is {_against(f'{low} to {high}', f'{low2} to {high2}')}"
    if a.primary != b.primary:
        named = [x.sizes.get(x.primary, x.primary) or "none" for x in (a, b)]
        mine, theirs = named if named[0] != named[1] else (a.primary, b.primary)
        return f"the size that chooses the artifact is {_against(mine, theirs)}"
    return None if p == q else "the order of their sizes or constants"


def _against(x: object, y: object) -> str:
    return f"{x} against {y}"


def _at(a: Listing, b: Listing, number: int) -> tuple[str, tuple[str, str]]:
    places = tuple(x.locations[number] if number < len(x.locations) else "" for x in (a, b))
    known = list(dict.fromkeys(place for place in places if place))
    files = [place.rpartition(":")[0] for place in known]
    if len(known) == 2 and files[0] == files[1]:
        known[1] = known[1].removeprefix(files[0])
    return (f" at {' against '.join(known)}" if known else ""), (places[0], places[1])
