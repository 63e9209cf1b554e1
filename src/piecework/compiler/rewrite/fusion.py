"""A pass that puts an IR op in the place of the ways in which modelling code spells it.

A match is exact. Operators, order, dtypes and numbers are those of a spelling; what is between isn't read by anything
else; and, on random values at typical sizes, the code of the piece and the op give the same bits, shapes and strides.
So integers need not be compared: axes may count from either end, halves be slices or chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from piecework.compiler.rewrite.interface import NearMiss, Pass, PassInput, PassResult
from piecework.compiler.rewrite.metas import ERRORS, MetaRun, form, run_call
from piecework.compiler.rewrite.rewritten import Fused, fuse
from piecework.compiler.rewrite.spelling import Pattern, Spelling, Traced
from piecework.compiler.rewrite.terms import Terms, terms_of
from piecework.compiler.rewrite.unify import Failure, Found, Search
from piecework.ops.ir.op import IrOp
from piecework.ops.ir.program import Call, references

Takes = Callable[..., str | None]
"""Says, of an op's arguments without contents, why the op is not for them, or None where it is."""


def fusion(name: str, op: IrOp, *, anchor: str, spellings: Sequence[Spelling], takes: Takes) -> Pass:
    """Return a pass.

    Args:
        name: the pass's.
        op: what takes the place of code.
        anchor: an operator that every spelling has, and little else.
        spellings: of the code; where several match, the first is taken.
        takes: see there.
    """
    traced = Traced(spellings)
    return Pass(name, lambda subject: _Fusing(subject, traced, op=op, anchor=anchor, takes=takes).outcome())


@dataclass(frozen=True)
class _Match:
    """What was found, and the call that takes its place."""

    fused: Fused
    text: str


@final
class _Fusing:
    """One run of a fusion over one program."""

    def __init__(self, subject: PassInput, traced: Traced, *, op: IrOp, anchor: str, takes: Takes) -> None:
        self._subject = subject
        self._program = subject.rewritten.program
        self._traced = traced
        self._op = op
        self._anchor = anchor
        self._takes = takes
        self._taken: set[int] = set()  # terms that are part of a match

    def outcome(self) -> PassResult:
        """Find and fuse."""
        if not any(call.target == self._anchor for call in self._program.calls):
            return PassResult(self._subject.rewritten)
        terms = self._terms = terms_of(self._program.calls, self._program.outputs)
        values = (value for kind in "nic" for value in self._subject.runs[0].values[kind])
        targets = {term.target for term in terms.terms.values()}
        patterns = self._traced.patterns(dtypes={_dtype(value) for value in values}, targets=targets)
        matches: list[_Match] = []
        failures: dict[int, str] = {}
        for anchor in [number for number, term in terms.terms.items() if term.target == self._anchor]:
            if anchor in self._taken:
                continue
            made = self._at(anchor, patterns)
            if isinstance(made, _Match):
                matches.append(made)
            elif made:
                failures[anchor] = made
        after = fuse(self._subject.rewritten, [match.fused for match in matches])
        origins = self._subject.rewritten.origins
        near = [NearMiss(why, origins[n]) for n, why in failures.items() if n not in self._taken]
        return PassResult(after, tuple(match.text for match in matches), tuple(near))

    def _at(self, anchor: int, patterns: Sequence[Pattern]) -> _Match | str:
        """Return the match at an anchor, or the near miss, or ""."""
        best: tuple[float, str] = (0.5, "")  # more than half of a spelling must be there, of its first result's part
        for pattern in patterns:
            search = Search(pattern, self._terms, dtype_of=self._dtype_of, named=self._named)
            for found in search.at(anchor, target=self._anchor):
                why = self._refused(pattern, found)
                if why is None:
                    return self._match(pattern, found)
                best = max(best, (2.0, self._near_miss(pattern, Failure(frozenset(found.calls.values()), why))))
            share = len(search.failure.fitted) * len(pattern.results) / pattern.size
            if search.failure.why and share > best[0]:
                best = (share, self._near_miss(pattern, search.failure))
        return best[1]

    def _near_miss(self, pattern: Pattern, failure: Failure) -> str:
        calls = self._subject.named(failure.fitted)
        return f"{self._op.short_name}: {calls} are nearly {pattern.spelling.name}, but {failure.why}"

    def _match(self, pattern: Pattern, found: Found) -> _Match:
        covers = frozenset(k for number in found.calls.values() for k in self._terms.members(number))
        roots = tuple(found.calls[result["n"]] for result in pattern.results)
        args = _arguments(pattern, found)
        self._taken |= set(found.calls.values())
        target = f"{self._op.name.replace('::', '.')}.default"
        text = f"{self._op.short_name}({self._shown(args)}) for {self._subject.named(covers)}, {pattern.spelling.name}"
        return _Match(Fused(Call(target, args, {}), roots, covers), text)

    def _refused(self, pattern: Pattern, found: Found) -> str | None:
        """Return why what was found must stay as it is, or None."""
        roots = [found.calls[result["n"]] for result in pattern.results]
        matched = set(found.calls.values())
        if matched & self._taken:
            return "a part of them is fused already"
        for number in sorted(matched - set(roots)):
            others = {n for n in self._terms.users[number] if n < 0 or self._terms.instead[n]["n"] not in matched}
            if others:
                who = "the piece's caller" if min(others) < 0 else self._subject.named(frozenset(others))
                return f"what {self._named(number)} gives is read by {who} too"
        args = _arguments(pattern, found)
        if any(n in roots for n in self._needed(args)):
            return "one of its arguments is computed from its result"
        for run in self._subject.runs:
            why = self._differs_at(run, roots, args, found)
            if why is not None:
                return why
        return None

    def _differs_at(self, run: MetaRun, roots: Sequence[int], args: Sequence[Any], found: Found) -> str | None:
        """Return what the op gives otherwise than the code at these sizes, or None."""
        metas = [run.of(argument) for argument in args]
        why = self._takes(*metas)
        if why is not None:
            return why
        values = _Values(self._program.calls, self._terms, run, list(found.tensors.values()))
        try:
            given = self._op.native(*(values.of(argument) for argument in args))
            made = given if isinstance(given, tuple) else (given,)
            wanted = [values.of({"n": root}) for root in roots]
        except ERRORS as error:
            return str(error).splitlines()[0]
        for root, a, b in zip(roots, made, wanted, strict=True):
            if form(a) != form(b):
                return f"{self._named(root)} gives {_described(b)}, the op {_described(a)}"
            if not torch.equal(a, b):
                where = [f"{self._named(n)} has {_plain(x)}, where it has {_plain(y)}" for n, x, y in found.differences]
                return "; ".join(where) or "the op gives other values"
        return None

    def _needed(self, args: Sequence[Any]) -> set[int]:
        """Return all calls from which arguments are computed."""
        left = [index for kind, index in references(args) if kind == "n"]
        needed: set[int] = set()
        while left:
            number = left.pop()
            if number not in needed:
                needed.add(number)
                call = self._program.calls[number]
                left += [index for kind, index in references([*call.args, *call.kwargs.values()]) if kind == "n"]
        return needed

    def _dtype_of(self, value: Any) -> str:
        found = isinstance(value, Mapping) and any(kind in value for kind in "nic")
        return _dtype(self._subject.runs[0].of(value)) if found else ""

    def _named(self, number: int) -> str:
        return self._subject.named([number])

    def _shown(self, args: Sequence[Any]) -> str:
        return ", ".join(self._subject.shown(argument) if _refers(argument) else str(argument) for argument in args)


@final
class _Values:
    """Random contents for the tensors of a match, and what its calls make of them, computed when they are asked for."""

    def __init__(self, calls: Sequence[Call], terms: Terms, run: MetaRun, tensors: Sequence[Any]) -> None:
        self._calls = calls
        self._terms = terms
        self._run = run
        generator = torch.Generator().manual_seed(0)
        self._made: dict[str, Any] = {}
        for reference in tensors:
            self._made[str(reference)] = _random_like(self._run.of(reference), generator)

    def of(self, value: Any) -> Any:
        """Return the value of an encoded argument."""
        if not _refers(value):
            return self._run.of(value)
        ((kind, index),) = references(value)
        return self._reference(kind, index)

    def _reference(self, kind: str, index: int) -> Any:
        reference = self._terms.instead[index] if kind == "n" else {kind: index}
        if str(reference) in self._made:
            return self._made[str(reference)]
        known = self._run.values[kind][index]
        if not isinstance(known, (torch.Tensor, tuple, list)):
            return known  # a size
        if kind != "n":
            raise RuntimeError(f"{kind} {index} is no argument of what was found")
        key = f"call {index}"
        if key not in self._made:
            self._made[key] = run_call(self._calls[index], self._reference, device="cpu")
        return self._made[key]


def _arguments(pattern: Pattern, found: Found) -> tuple[Any, ...]:
    """Return the op's arguments, as references of the program and numbers."""
    tensors = {name: found.tensors[index] for index, (name, _) in enumerate(pattern.tensors)}
    given = {**tensors, **found.numbers}
    return tuple(pattern.spelling.arguments(**given))


def _random_like(meta: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return values of a tensor's shape, strides and dtype; where it is expanded, they repeat."""
    single = [1 if stride == 0 else size for size, stride in zip(meta.shape, meta.stride(), strict=True)]
    made = torch.empty_strided(single, meta.stride(), dtype=meta.dtype)
    made.copy_(torch.randn(single, generator=generator) * 2)
    return made.expand(meta.shape)


def _refers(value: Any) -> bool:
    return isinstance(value, Mapping) and any(kind in value for kind in "nic")


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else ""


def _described(tensor: Any) -> str:
    layout = "" if tensor.is_contiguous() else f" of strides {list(tensor.stride())}"
    return f"{_dtype(tensor)}{list(tensor.shape)}{layout}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a size"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_plain(item) for item in value)}]"
    return str(value)
