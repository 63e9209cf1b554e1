"""Operators that give what they are given are left out.

before: squeeze(unsqueeze(x, 0), 0); mul(cos, 1.0); alias(x); slice(x, 1, 0, all of it)
after:  x; cos; x; x

What captures really have: adapters that add an axis which the next module takes away, factors of 1 (the attention
factor of a rotary type that has none, the scale of routed weights), views and copies of a tensor as it was, casts to
its own dtype. Shapes, strides and dtypes stay what they were at all sizes, the ends of their ranges included.

A near miss is a result of the piece that would become one of its inputs, or another of its results: those are told
apart by whoever calls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from piecework.compiler.rewrite.interface import NearMiss, Pass, PassInput, PassResult
from piecework.compiler.rewrite.metas import ERRORS, MetaRun, form, place, run_on_metas
from piecework.compiler.rewrite.rewritten import fuse
from piecework.ops.ir.program import Call, Program, references

_COPIES: Final = frozenset({"aten._to_copy.default", "aten.clone.default"})
_VIEWS: Final = frozenset(
    f"aten.{name}"
    for name in (
        "alias.default",
        "detach.default",
        "lift_fresh.default",
        "view.default",
        "_unsafe_view.default",
        "reshape.default",
        "expand.default",
        "slice.Tensor",
        "squeeze.default",
        "squeeze.dim",
        "squeeze.dims",
        "unsqueeze.default",
        "transpose.int",
        "permute.default",
    )
)
_FACTORS: Final = frozenset({"aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar"})


def no_ops(subject: PassInput) -> PassResult:
    """Leave out what can be."""
    program = subject.rewritten.program
    runs = [*subject.runs, *_at_the_ends(program)]
    same: dict[int, Any] = {}
    for number in range(len(program.calls)):
        earlier = _earlier(program, number, runs)
        if earlier is not None:
            same[number] = _followed(earlier, same)
    near_misses: list[NearMiss] = []
    for number, why in _results_that_would_be_shared(program, same):
        near_misses.append(NearMiss(f"no_ops: {_shown(subject, number)} is left, because {why}"))
        del same[number]
    matches = tuple(f"no_ops: {_shown(subject, number)}" for number in same)
    return PassResult(fuse(subject.rewritten, (), same=same), matches, tuple(near_misses))


def make_pass() -> Pass:
    """Return the pass."""
    return Pass("no_ops", no_ops)


def _shown(subject: PassInput, number: int) -> str:
    return f"{subject.named([number])}, {subject.rewritten.program.calls[number].target}"


def _at_the_ends(program: Program) -> list[MetaRun]:
    """Run a program with all sizes the least, and with all the greatest, where it can be run."""
    runs = []
    least = {name: low for name, low, _ in program.symbols}
    greatest = {name: high for name, _, high in program.symbols}
    for sizes in (least, greatest):
        try:
            runs.append(run_on_metas(program, sizes))
        except ERRORS:
            continue  # sizes that can't be at once, or whose products are beyond all memory
    return runs


def _earlier(program: Program, number: int, runs: Sequence[MetaRun]) -> Any:
    """Return the reference of an earlier value that a call's result is the same as, or None."""
    call = program.calls[number]
    if not isinstance(runs[0].values["n"][number], torch.Tensor):
        return None
    source = call.args[0] if call.args else None
    if not (isinstance(source, Mapping) and any(kind in source for kind in "nic")):
        return None
    if call.target in _COPIES or (call.target in _FACTORS and _is_one(call)):
        return source if all(_alike(run.of(source), run.values["n"][number]) for run in runs) else None
    if call.target not in _VIEWS:
        return None
    for reference in _sources(program, source):
        if all(_is_same(run.of(reference), run.values["n"][number]) for run in runs):
            return reference
    return None


def _is_one(call: Call) -> bool:
    factor = call.args[1] if len(call.args) == 2 and not call.kwargs else None
    return isinstance(factor, (int, float)) and factor == 1


def _alike(given: Any, result: torch.Tensor) -> bool:
    return isinstance(given, torch.Tensor) and form(given) == form(result)


def _is_same(given: Any, result: torch.Tensor) -> bool:
    return isinstance(given, torch.Tensor) and place(given) == place(result)


def _sources(program: Program, source: Any) -> list[Any]:
    """Return a value and what it may be a view of, the first of all first."""
    chain = [source]
    while "n" in chain[-1] and program.calls[chain[-1]["n"]].target in _VIEWS:
        chain.append(program.calls[chain[-1]["n"]].args[0])
    return chain[::-1]


def _followed(reference: Any, same: Mapping[int, Any]) -> Any:
    while reference.get("n", -1) in same:
        reference = same[reference["n"]]
    return reference


def _results_that_would_be_shared(program: Program, same: Mapping[int, Any]) -> list[tuple[int, str]]:
    """Return the calls that give results of the piece and must stay, and why."""
    seen: set[tuple[str, int]] = set()
    stay: list[tuple[int, str]] = []
    given = [next(references(output)) for output in program.outputs]
    seen.update((kind, index) for kind, index in given if kind != "n" or index not in same)
    for kind, index in given:
        if kind != "n" or index not in same:
            continue
        target = next(references(same[index]))
        if target[0] != "n":
            stay.append((index, "it would make an input of the piece one of its results"))
        elif target in seen:
            stay.append((index, "it would make two results of the piece one"))
        else:
            seen.add(target)
    return list(dict(stay).items())
