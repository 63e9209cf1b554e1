"""Calls in the one form in which patterns are compared with programs: what differs only in how it is written is equal.

Equal calls of equal arguments are one; results of a split are slices; `x * x` is a power; in-place operators of a
traced pattern are the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from piecework.compiler.rewrite.rewritten import GETITEM, mapped
from piecework.ops.ir.program import Call, references

SLICE: Final = "aten.slice.Tensor"
COMMUTATIVE: Final = frozenset({"aten.add.Tensor", "aten.mul.Tensor"})
_SPLITS: Final = frozenset({"aten.split.Tensor", "aten.split_with_sizes.default", "aten.unbind.int"})
_SAME: Final = {
    "aten.add.Scalar": "aten.add.Tensor",
    "aten.add_.Scalar": "aten.add.Tensor",
    "aten.add_.Tensor": "aten.add.Tensor",
    "aten.mul.Scalar": "aten.mul.Tensor",
    "aten._unsafe_view.default": "aten.view.default",
    "aten.select.int": SLICE,
}
_PASSED_ON: Final = frozenset({"aten.alias.default", "aten.detach.default"})


@dataclass(frozen=True)
class Term:
    """A call: its references are of terms, and `axes` are integers that say where, compared by what they do."""

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Terms:
    """The terms of some calls.

    Attributes:
        terms: by the number of the first call that gives it.
        instead: for each call, the reference of the term that it is.
        users: for each term, the numbers of all calls that read it; -1 stands for whoever reads the results.
    """

    terms: Mapping[int, Term]
    instead: tuple[Any, ...]
    users: Mapping[int, frozenset[int]]

    @property
    def numbers(self) -> tuple[int, ...]:
        """The calls that are terms of their own."""
        return tuple(self.terms)

    def of(self, value: Any) -> Any:
        """Return an encoded value with references of terms."""
        return mapped(value, lambda kind, index: self.instead[index] if kind == "n" else {kind: index})

    def members(self, number: int) -> frozenset[int]:
        """Return all calls that are a term."""
        return frozenset(k for k, reference in enumerate(self.instead) if reference == {"n": number})


def terms_of(calls: Sequence[Call], read: Sequence[Any]) -> Terms:
    """Return the terms of calls, of which the references `read` are the results."""
    terms: dict[int, Term] = {}
    instead: list[Any] = []
    known: dict[str, int] = {}

    def of(value: Any) -> Any:
        return mapped(value, lambda kind, index: instead[index] if kind == "n" else {kind: index})

    for number, call in enumerate(calls):
        args = tuple(of(argument) for argument in call.args)
        if call.target in _PASSED_ON:
            instead.append(args[0])
            continue
        term = _term(call, args, {name: of(value) for name, value in call.kwargs.items()}, terms)
        key = json.dumps([term.target, list(term.args), dict(term.kwargs)], sort_keys=True)
        first = known.setdefault(key, number)
        if first == number:
            terms[number] = term
        instead.append({"n": first})
    users: dict[int, set[int]] = {number: set() for number in terms}
    for number, call in enumerate(calls):
        if call.target in _SPLITS or call.target in _PASSED_ON:
            continue  # who reads their results counts
        term = terms.get(number) or terms[instead[number]["n"]]
        for kind, index in references([*term.args, *term.kwargs.values()]):
            if kind == "n":
                users[index].add(number)
    for value in read:
        for kind, index in references(of(value)):
            if kind == "n":
                users[index].add(-1)
    return Terms(terms, tuple(instead), {number: frozenset(found) for number, found in users.items()})


def _term(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], terms: Mapping[int, Term]) -> Term:
    target = _SAME.get(call.target, call.target)
    if target == GETITEM:
        source = terms.get(args[0].get("n", -1))
        if source is not None and source.target in _SPLITS:
            return Term(SLICE, (source.args[0], [args[1], *source.args[1:]]), {})
    if target == SLICE:
        return Term(SLICE, (args[0], list(args[1:])), kwargs)
    if target == "aten.mul.Tensor" and args[0] == args[1]:
        return Term("aten.pow.Tensor_Scalar", (args[0], 2), kwargs)
    if target == "aten._to_copy.default":
        kwargs = {name: value for name, value in kwargs.items() if name not in {"layout", "device", "pin_memory"}}
    return Term(target, args, kwargs)
