"""Two layers side by side: every piece and every opaque op that either has part in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from piecework.bundle.plan import OpStep, PieceStep
from piecework.errors import PieceworkError
from piecework.report.layers import Layer, LayerStack, find_stacks, op_arguments
from piecework.report.lifting import is_bound, label_of, op_argument_names, show_argument
from piecework.report.spelling import spell_numbers
from piecework.report.subject import ExplainedPlan, piece_letter


@dataclass(frozen=True)
class PairedPiece:
    """The pieces at one place of two layers.

    Args:
        place: counted from 1.
        pieces: both pieces' letters, "" where a layer has no more.
        holders: the layers that have part in each.
        difference: the first difference between them; "" where they are one, or one of them is missing.
    """

    place: int
    pieces: tuple[str, str]
    holders: tuple[tuple[int, ...], tuple[int, ...]]
    difference: str = ""


@dataclass(frozen=True)
class PairedOp:
    """The opaque ops at one place of two layers, and the arguments that differ: label, and both values."""

    place: int
    ops: tuple[str, str]
    differing: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class PairReport:
    """Two layers of a stack, each with the pieces that begin, lie or end in it."""

    stack: str
    layers: tuple[int, int]
    pieces: tuple[PairedPiece, ...]
    ops: tuple[PairedOp, ...]


def compare_layers(subject: ExplainedPlan, layers: tuple[int, int]) -> tuple[PairReport, ...]:
    """Compare two layers in every stack that has both. Raises PieceworkError where none has."""
    stacks = find_stacks(subject.plan)
    made: list[PairReport] = []
    for stack in stacks if layers[0] != layers[1] else ():
        by_number = {layer.number: layer for layer in stack.layers}
        if all(number in by_number for number in layers):
            made.append(_pair(subject, stack, (by_number[layers[0]], by_number[layers[1]])))
    if not made:
        known = ", ".join(f"{s.name or 'the module'} with the layers {_numbers(s)}" for s in stacks)
        raise PieceworkError(
            asked=f"compare the layers {layers[0]} and {layers[1]} of {subject.name}",
            found=known or "no list of modules whose elements' tensors it uses",
            try_="name two of those layers" if known else "name the module that has layers",
        )
    return tuple(made)


def _numbers(stack: LayerStack) -> str:
    return spell_numbers(layer.number for layer in stack.layers)


def _pair(subject: ExplainedPlan, stack: LayerStack, layers: tuple[Layer, Layer]) -> PairReport:
    steps = subject.plan.steps
    pieces = [[s for s in layer.steps if isinstance(steps[s], PieceStep)] for layer in layers]
    ops = [[step for s in layer.steps if isinstance(step := steps[s], OpStep)] for layer in layers]
    return PairReport(
        stack=stack.name,
        layers=(layers[0].number, layers[1].number),
        pieces=tuple(_piece(subject, stack, n, a, b) for n, (a, b) in enumerate(zip_longest(*pieces), start=1)),
        ops=tuple(_op(subject, n, a, b) for n, (a, b) in enumerate(zip_longest(*ops), start=1)),
    )


def _piece(subject: ExplainedPlan, stack: LayerStack, place: int, a: int | None, b: int | None) -> PairedPiece:
    difference = subject.difference(a, b) if a is not None and b is not None else None
    letters = ["" if step is None else piece_letter(subject.piece(step)) for step in (a, b)]
    holders = [() if step is None else stack.holders[step] for step in (a, b)]
    return PairedPiece(
        place, (letters[0], letters[1]), (holders[0], holders[1]), difference.text if difference is not None else ""
    )


def _op(subject: ExplainedPlan, place: int, a: OpStep | None, b: OpStep | None) -> PairedOp:
    names = ("" if a is None else a.op, "" if b is None else b.op)
    if a is None or b is None or a.op != b.op:
        return PairedOp(place, names, ())
    return PairedOp(place, names, tuple(_differing(subject, a, b, names=op_argument_names(subject, a.op))))


def _differing(subject: ExplainedPlan, a: OpStep, b: OpStep, *, names: Sequence[str]) -> list[tuple[str, str, str]]:
    mine, theirs = op_arguments(a), op_arguments(b)
    return [
        (label_of(key, names=names), show_argument(subject.plan, mine[key]), show_argument(subject.plan, theirs[key]))
        for key in mine
        if key in theirs and is_bound(mine[key]) and is_bound(theirs[key]) and mine[key] != theirs[key]
    ]
