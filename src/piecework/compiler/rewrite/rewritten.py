"""A program on its way through the passes: what it became so far, and what its calls were when it was captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

from piecework.errors import InternalError
from piecework.ops.ir.program import Call, Program, references

GETITEM: Final = "operator.getitem"


@dataclass(frozen=True)
class Rewritten:
    """A program after some passes.

    Attributes:
        program: the program.
        constants: for each of its constants, the constants of the captured program that it concatenates (one: as it
            was).
        origins: for each of its calls, the numbers of the captured program's calls that it stands for.
    """

    program: Program
    constants: tuple[tuple[int, ...], ...]
    origins: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Fused:
    """A call that takes the place of others.

    Attributes:
        call: the new one; its arguments are references of the old program.
        results: for each of its results, the number of the old call that gave it.
        covers: numbers of all old calls that it stands for.
    """

    call: Call
    results: tuple[int, ...]
    covers: frozenset[int]


def as_captured(program: Program) -> Rewritten:
    """Return a program that no pass has seen."""
    constants = tuple((index,) for index in range(len(program.constants)))
    return Rewritten(program, constants, tuple((index,) for index in range(len(program.calls))))


def results_used(program: Program) -> dict[int, set[int]]:
    """Return for each call the numbers of the calls that read its result; -1 stands for the piece's caller."""
    users: dict[int, set[int]] = {number: set() for number in range(len(program.calls))}
    for number, call in enumerate(program.calls):
        for kind, index in references([*call.args, *call.kwargs.values()]):
            if kind == "n":
                users[index].add(number)
    for output in program.outputs:
        for kind, index in references(output):
            if kind == "n":
                users[index].add(-1)
    return users


def fuse(before: Rewritten, fused: Sequence[Fused], *, same: Mapping[int, Any] | None = None) -> Rewritten:
    """Write new calls in the place of others, and drop what nobody reads any more.

    Args:
        before: the program.
        fused: the new calls. None may need, by way of other calls, a result that it gives.
        same: call → the reference that is read instead of its result.
    """
    if not fused and not same:
        return before
    program = before.program
    writer = _Writer(before, fused, same or {})
    for number in range(len(program.calls)):
        writer.write(number)
    outputs = tuple(mapped(output, writer.reference) for output in program.outputs)
    made = replace(program, calls=tuple(writer.calls), outputs=outputs)
    unread_before = _num_unread(program)
    return _without_unread(Rewritten(made, before.constants, tuple(writer.origins)), unread_before=unread_before)


@final
class _Writer:
    """Writes a program anew; what a call needs is written before it."""

    def __init__(self, before: Rewritten, fused: Sequence[Fused], same: Mapping[int, Any]) -> None:
        self.calls: list[Call] = []
        self.origins: list[tuple[int, ...]] = []
        self._before = before
        self._same = same
        self._by_root = {root: item for item in fused for root in item.results}
        self._left_out = {number for item in fused for number in item.covers} - set(self._by_root)
        self._moved: dict[int, Any] = {}
        self._under_way: set[int] = set()

    def write(self, number: int) -> None:
        """Write an old call, or what takes its place, unless that is done or nobody has asked for it."""
        if number not in self._moved and number not in self._left_out:
            self._write(number)

    def reference(self, kind: str, index: int) -> Any:
        """Return a reference of the old program as one of the new."""
        if kind != "n":
            return {kind: index}
        if index not in self._moved:
            self._write(index)
        return self._moved[index]

    def _write(self, number: int) -> None:
        if number in self._under_way:
            raise InternalError(f"call {number} of a fused program needs its own result")
        self._under_way.add(number)
        if number in self._same:
            self._moved[number] = mapped(self._same[number], self.reference)
        elif number in self._by_root:
            self._write_fused(self._by_root[number])
        else:
            call = self._before.program.calls[number]
            self._moved[number] = self._append(self._translated(call), self._before.origins[number])
        self._under_way.discard(number)

    def _write_fused(self, item: Fused) -> None:
        origin = tuple(sorted({k for number in item.covers for k in self._before.origins[number]}))
        whole = self._append(self._translated(item.call), origin)
        for position, root in enumerate(item.results):
            several = len(item.results) > 1
            self._moved[root] = self._append(Call(GETITEM, (whole, position), {}), origin) if several else whole

    def _translated(self, call: Call) -> Call:
        args = tuple(mapped(argument, self.reference) for argument in call.args)
        return Call(call.target, args, {name: mapped(value, self.reference) for name, value in call.kwargs.items()})

    def _append(self, call: Call, origin: tuple[int, ...]) -> dict[str, int]:
        self.calls.append(call)
        self.origins.append(origin)
        return {"n": len(self.calls) - 1}


def _num_unread(program: Program) -> int:
    return sum(not users for users in results_used(program).values())


def _without_unread(made: Rewritten, *, unread_before: int) -> Rewritten:
    """Drop calls whose results nobody reads; those that were so from the start (there are none in a capture) stay."""
    if unread_before:
        return made
    program, kept = made.program, set(range(len(made.program.calls)))
    users = results_used(program)
    for number in reversed(range(len(program.calls))):
        if not users[number] & (kept | {-1}):
            kept.discard(number)
    if len(kept) == len(program.calls):
        return made
    numbers = {old: new for new, old in enumerate(sorted(kept))}

    def reference(kind: str, index: int) -> Any:
        return {kind: numbers[index] if kind == "n" else index}

    calls = tuple(
        Call(
            program.calls[old].target,
            tuple(mapped(a, reference) for a in program.calls[old].args),
            {name: mapped(value, reference) for name, value in program.calls[old].kwargs.items()},
        )
        for old in numbers
    )
    outputs = tuple(mapped(output, reference) for output in program.outputs)
    origins = tuple(made.origins[old] for old in numbers)
    return replace(made, program=replace(program, calls=calls, outputs=outputs), origins=origins)


def mapped(value: Any, reference: Callable[[str, int], Any]) -> Any:
    """Return an encoded argument with each of its references replaced by what `reference(kind, index)` gives."""
    if isinstance(value, Mapping):
        for kind in ("n", "i", "c"):
            if kind in value:
                return reference(kind, value[kind])
        return value
    if isinstance(value, (list, tuple)):
        return [mapped(item, reference) for item in value]
    return value
