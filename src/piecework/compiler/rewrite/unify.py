"""Find where a pattern stands in a program: from its anchor downwards to what it reads, and up to its result.

Everything must be equal but integers that say where (axes, bounds, sizes), which are written in many ways: they are
noted where they differ, and the values decide (`compiler/rewrite/fusion.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from piecework.compiler.rewrite.spelling import Pattern
from piecework.compiler.rewrite.terms import COMMUTATIVE, Term, Terms
from piecework.ops.ir.program import references


@dataclass(frozen=True)
class Found:
    """How much of a pattern stands in a program.

    Attributes:
        calls: terms of the pattern → terms of the program.
        tensors: {"i": k} of the pattern → references of the program.
        numbers: names of numbers → their values.
        differences: integers that differ, as (term of the program, what it has, what the pattern has).
    """

    calls: Mapping[int, int] = field(default_factory=dict)
    tensors: Mapping[int, Any] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    differences: tuple[tuple[int, Any, Any], ...] = ()


@dataclass(frozen=True)
class Failure:
    """Where the most promising attempt ended: how many calls fitted, which, and why the next one didn't.

    Attributes:
        fitted: terms of the program.
        why: for people.
    """

    fitted: frozenset[int] = frozenset()
    why: str = ""


@final
class Search:
    """One pattern, looked for in one program.

    Args:
        pattern: what is looked for.
        terms: the program's.
        dtype_of: the dtype of a reference, as programs write it; "" for what is no tensor.
        named: the name of a call for people, of its number.
    """

    def __init__(self, pattern: Pattern, terms: Terms, *, dtype_of: Any, named: Any) -> None:
        self._pattern = pattern
        self._terms = terms
        self._dtype_of = dtype_of
        self._named = named
        self.failure = Failure()

    def at(self, anchor: int, *, target: str) -> Iterator[Found]:
        """Yield all ways in which the pattern stands with its first call of an operator at a call of the program."""
        own = self._pattern.terms
        first = next((n for n in own.numbers if own.terms[n].target == target), None)
        if first is None:
            return
        path = _path(own, first, self._pattern.results[0])
        for found in self._calls(first, anchor, Found()):
            yield from self._up(path, found)

    def _up(self, path: Sequence[int], found: Found) -> Iterator[Found]:
        """Go from the anchor to the result; `path` are the pattern's terms on that way."""
        if len(path) == 1:
            yield from self._rest(found, 1)
            return
        here, there = found.calls[path[0]], path[1]
        wanted = self._pattern.terms.terms[there].target
        readers = sorted(n for n in self._terms.users[here] if n >= 0)
        readers = sorted({self._terms.instead[n]["n"] for n in readers})
        for reader in readers:
            if self._terms.terms[reader].target == wanted:
                for more in self._calls(there, reader, found):
                    yield from self._up(path[1:], more)
        targets = [self._terms.terms[n].target for n in readers]
        if wanted not in targets:
            goes = f"goes to {', '.join(dict.fromkeys(targets))}" if targets else "is a result of the piece"
            self._fail(found, f"{self._named(here)} {goes}, where it has {wanted}")

    def _rest(self, found: Found, result: int) -> Iterator[Found]:
        """Find the results after the first, which are somewhere in the program."""
        if result == len(self._pattern.results):
            yield found
            return
        wanted = self._pattern.results[result]["n"]
        if wanted in found.calls:
            yield from self._rest(found, result + 1)
            return
        target = self._pattern.terms.terms[wanted].target
        taken = set(found.calls.values())
        for number, term in self._terms.terms.items():
            if term.target == target and number not in taken:
                for more in self._calls(wanted, number, found):
                    yield from self._rest(more, result + 1)
        self._fail(found, f"there is no {_ordinal(result)} result of the same")

    def _calls(self, own: int, other: int, found: Found) -> Iterator[Found]:
        if own in found.calls:
            if found.calls[own] == other:
                yield found
            return
        if other in found.calls.values():
            return
        a, b = self._pattern.terms.terms[own], self._terms.terms[other]
        if a.target != b.target:
            self._fail(found, f"{self._named(other)} is {b.target}, where it has {a.target}")
            return
        if len(a.args) != len(b.args) or set(a.kwargs) != set(b.kwargs):
            self._fail(found, f"{self._named(other)}, {b.target}, has other options")
            return
        begun = replace(found, calls={**found.calls, own: other})
        for args in _orders(a):
            pairs = [*zip(args, b.args, strict=True), *((a.kwargs[name], b.kwargs[name]) for name in a.kwargs)]
            yield from self._all(pairs, other, begun)

    def _all(self, pairs: Sequence[tuple[Any, Any]], other: int, found: Found) -> Iterator[Found]:
        if not pairs:
            yield found
            return
        for more in self._values(*pairs[0], other, found):
            yield from self._all(pairs[1:], other, more)

    def _values(self, own: Any, value: Any, other: int, found: Found) -> Iterator[Found]:
        """Compare an argument of the pattern with one of the program's call `other`."""
        if isinstance(own, Mapping) and "i" in own:
            yield from self._tensor(own["i"], value, other, found)
        elif isinstance(own, Mapping) and "n" in own:
            if isinstance(value, Mapping) and "n" in value:
                yield from self._calls(own["n"], value["n"], found)
            else:
                wanted = self._pattern.terms.terms[own["n"]].target
                self._fail(found, f"{self._named(other)} reads {_shown(value)}, where it has {wanted}")
        elif isinstance(own, list) and any(True for _ in references(own)):
            if isinstance(value, list) and len(value) == len(own):
                yield from self._all(list(zip(own, value, strict=True)), other, found)
            else:
                self._fail(found, f"{self._named(other)} has another number of tensors")
        elif isinstance(own, float):
            yield from self._number(own, value, other, found)
        elif _says_where(own):
            if value == own or _says_where(value) or (isinstance(value, Mapping) and "n" in value):
                noted = () if value == own else ((other, value, own),)
                yield replace(found, differences=(*found.differences, *noted))
            else:
                self._differs(other, value, own, found)
        elif own == value:
            yield found
        else:
            self._differs(other, value, own, found)

    def _tensor(self, own: int, value: Any, other: int, found: Found) -> Iterator[Found]:
        name, dtype = self._pattern.tensors[own]
        if own in found.tensors:
            if found.tensors[own] == value:
                yield found
            else:
                self._fail(found, f"{self._named(other)} has another tensor as {name}")
            return
        made = self._dtype_of(value)
        if made == dtype:
            yield replace(found, tensors={**found.tensors, own: value})
        else:
            self._fail(found, f"{name} of {self._named(other)} is {made or _shown(value)}, no tensor of {dtype}")

    def _number(self, own: float, value: Any, other: int, found: Found) -> Iterator[Found]:
        name = self._pattern.numbers.get(own)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name is None and is_number and float(value) == own:
            yield found
        elif name is not None and is_number and found.numbers.get(name, value) == value:
            yield replace(found, numbers={**found.numbers, name: value})
        else:
            self._differs(other, value, name or own, found)

    def _differs(self, other: int, value: Any, own: Any, found: Found) -> None:
        target = self._terms.terms[other].target
        self._fail(found, f"{self._named(other)}, {target}, has {_shown(value)}, where it has {_shown(own)}")

    def _fail(self, found: Found, why: str) -> None:
        if len(found.calls) > len(self.failure.fitted):
            self.failure = Failure(frozenset(found.calls.values()), why)


def _path(terms: Terms, first: int, result: Any) -> list[int]:
    """Return the terms from one to the result, each reading the one before."""
    wanted = result["n"]
    ways = [[first]]
    while ways:
        way = ways.pop(0)
        if way[-1] == wanted:
            return way
        readers = {terms.instead[n]["n"] for n in terms.users[way[-1]] if n >= 0}
        ways += [[*way, reader] for reader in sorted(readers)]
    return [first]


def _orders(term: Term) -> list[tuple[Any, ...]]:
    """Return the orders in which a call's arguments may stand."""
    both = term.target in COMMUTATIVE and len(term.args) == 2 and all(isinstance(a, Mapping) for a in term.args)
    return [term.args, term.args[::-1]] if both else [term.args]


def _says_where(value: Any) -> bool:
    """Whether a value is an integer, or a list of integers and sizes."""
    if isinstance(value, (list, tuple)):
        return all(_says_where(item) or item is None or isinstance(item, Mapping) for item in value)
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a tensor" if any(kind in value for kind in "nic") else str(next(iter(value.values())))
    return str(value)


def _ordinal(result: int) -> str:
    return ("first", "second", "third")[result] if result < 3 else f"{result + 1}th"
