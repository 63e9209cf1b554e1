"""Which layers share their pieces, and where the others first differ from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from piecework.bundle.plan import PieceStep, Step
from piecework.report.layers import Layer, LayerStack, find_stacks, layer_of_name, step_names
from piecework.report.parts import layer_of_call
from piecework.report.subject import ExplainedPlan, piece_letter


@dataclass(frozen=True)
class PieceSharing:
    """A unique piece and who uses it.

    Args:
        letter: its name in the report, "A".
        fingerprint: of its structure.
        num_uses: how many of the plan's steps run it, those of all forwards.
        num_ops: how many operators it has.
        num_constants: how many tensors each use binds.
        layers: by stack, the layers whose own it is, or that have part in it and no piece of their own.
        leads_into: by stack, the layer whose beginning it ends with.
        others: names of tensors that one of its uses binds and that belong to no layer.
        forwards: where only forwards for some kinds of batches use it, their names. Layers are those of the forward for
            all other batches.
    """

    letter: str
    fingerprint: str
    num_uses: int
    num_ops: int
    num_constants: int
    layers: dict[str, tuple[int, ...]]
    leads_into: dict[str, int]
    others: tuple[str, ...]
    forwards: tuple[str, ...] = ()


@dataclass(frozen=True)
class PieceDifference:
    """The piece at one place of a layer, against another layer's at the same place.

    Args:
        place: among the layer's pieces, counted from 1.
        piece, other: both pieces' letters.
        text: the first difference between them, the layer's against the other's.
        call: see `Difference`.
        locations: see `Difference`.
        layer: where the layer's piece reaches into the next one, and the difference lies there, that one's number.
        extra: names of tensors that only the layer's piece binds and that belong to no layer.
    """

    place: int
    piece: str
    other: str
    text: str
    call: int | None
    locations: tuple[str, str]
    layer: int | None
    extra: tuple[str, ...]


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share all their pieces.

    Args:
        layers: their numbers.
        pieces: the letters of the pieces that each of them has, in order.
        reference: a layer of the largest group that they are compared with; None for that group itself.
        differences: the places where the first of them differs from the reference.
        reference_pieces: as `pieces`, of the reference.
    """

    layers: tuple[int, ...]
    pieces: tuple[str, ...]
    reference: int | None = None
    differences: tuple[PieceDifference, ...] = ()
    reference_pieces: tuple[str, ...] = ()


@dataclass(frozen=True)
class StackSharing:
    """The layers of one stack.

    Args:
        name: "model.layers".
        layers: their numbers.
        groups: the largest first, then in the order of their layers.
        uncut: layers that one piece holds, so that they can't be told apart, by the piece's letter.
        spans: whether pieces reach from one layer into the next.
    """

    name: str
    layers: tuple[int, ...]
    groups: tuple[LayerGroup, ...]
    uncut: dict[str, tuple[int, ...]]
    spans: bool


def share_pieces(subject: ExplainedPlan, stacks: Sequence[LayerStack]) -> tuple[PieceSharing, ...]:
    """Return the unique pieces of a plan with their users."""
    steps: dict[int, list[int]] = {index: [] for index in range(len(subject.plan.pieces))}
    for step, found in enumerate(subject.plan.steps):
        if isinstance(found, PieceStep):
            steps[subject.piece(step)].append(step)
    instances = subject.plan.instances
    uses = Counter(instances[s.instance].piece for s in subject.plan.all_steps if isinstance(s, PieceStep))
    made = []
    for index, piece in enumerate(subject.plan.pieces):
        used = set(steps[index])
        owners = {s.name: tuple(x.number for x in s.layers if used & set(x.own or x.steps)) for s in stacks}
        made.append(
            PieceSharing(
                letter=piece_letter(index),
                fingerprint=piece.fingerprint,
                num_uses=uses[index],
                num_ops=piece.num_ops,
                num_constants=piece.num_constants,
                layers={name: numbers for name, numbers in owners.items() if numbers},
                leads_into={s.name: s.holders[s.entry][0] for s in stacks if s.entry in steps[index]},
                others=_others(subject, steps[index][0], stacks) if steps[index] else (),
                forwards=() if steps[index] else _forwards(subject, index),
            )
        )
    return tuple(made)


def _forwards(subject: ExplainedPlan, piece: int) -> tuple[str, ...]:
    def runs(step: Step) -> bool:
        return isinstance(step, PieceStep) and subject.plan.instances[step.instance].piece == piece

    return tuple(variant.name for variant in subject.plan.variants if any(runs(step) for step in variant.steps))


def share_layers(subject: ExplainedPlan) -> tuple[StackSharing, ...]:
    """Return how the layers of each stack share their pieces."""
    stacks = find_stacks(subject.plan)
    return tuple(_stack(subject, stack, stacks) for stack in stacks)


def _compare(
    subject: ExplainedPlan, stack: LayerStack, mine: Layer, theirs: Layer, *, stacks: Sequence[LayerStack]
) -> tuple[PieceDifference, ...]:
    """Compare two layers' own pieces, place by place; one difference per place where they differ."""
    found = []
    for place, (a, b) in enumerate(zip(mine.own, theirs.own, strict=False)):
        difference = subject.difference(a, b)
        if difference is None:
            continue
        known = set(_others(subject, b, stacks))
        found.append(
            PieceDifference(
                place=place + 1,
                piece=piece_letter(subject.piece(a)),
                other=piece_letter(subject.piece(b)),
                text=difference.text,
                call=difference.call,
                locations=difference.locations,
                layer=_next_layer(subject, stack, mine, step=a, call=difference.call),
                extra=tuple(n for n in _others(subject, a, stacks) if n not in known),
            )
        )
    return tuple(found)


def _stack(subject: ExplainedPlan, stack: LayerStack, stacks: Sequence[LayerStack]) -> StackSharing:
    without = {step for layer in stack.layers if not layer.own for step in layer.steps}
    uncut = {s: stack.holders[s] for s in sorted(without) if isinstance(subject.plan.steps[s], PieceStep)}
    by_pieces: dict[tuple[int, ...], list[Layer]] = {}
    for layer in stack.layers:
        if not set(layer.own) <= set(uncut):
            by_pieces.setdefault(tuple(subject.piece(step) for step in layer.own), []).append(layer)
    groups = list(by_pieces.values())
    largest = max(groups, key=len, default=[])
    made = [_group(subject, stack, group, largest, stacks=stacks) for group in groups if group is not largest]
    return StackSharing(
        name=stack.name,
        layers=tuple(layer.number for layer in stack.layers),
        groups=(_group(subject, stack, largest, largest, stacks=stacks), *made) if largest else (),
        uncut={piece_letter(subject.piece(step)): tuple(sorted(numbers)) for step, numbers in uncut.items()},
        spans=stack.spans,
    )


def _group(
    subject: ExplainedPlan, stack: LayerStack, group: list[Layer], largest: list[Layer], *, stacks: Sequence[LayerStack]
) -> LayerGroup:
    first = group[0]
    numbers, letters = tuple(layer.number for layer in group), _letters(subject, first)
    if group is largest:
        return LayerGroup(numbers, letters)
    # the nearest one before it, because that is the one that a reader looks at
    before = [layer for layer in largest if layer.number < first.number]
    reference = before[-1] if before else largest[0]
    return LayerGroup(
        layers=numbers,
        pieces=letters,
        reference=reference.number,
        differences=_compare(subject, stack, first, reference, stacks=stacks),
        reference_pieces=_letters(subject, reference),
    )


def _next_layer(subject: ExplainedPlan, stack: LayerStack, layer: Layer, *, step: int, call: int | None) -> int | None:
    """Return the layer in which a call of a piece lies where it isn't `layer`, whose own the piece is."""
    if subject.explanation is None or call is None or len(stack.holders[step]) < 2:
        return None
    program = subject.explanation.listings[subject.piece(step)].program
    names = [made.name for made in subject.plan.captured_constants(subject.instance(step))]
    if call > len(program.calls):
        return None
    found = layer_of_call(program, call - 1, layers=[layer_of_name(name, stack.name) for name in names])
    return found if found != layer.number else None


def _letters(subject: ExplainedPlan, layer: Layer) -> tuple[str, ...]:
    return tuple(piece_letter(subject.piece(step)) for step in layer.own)


def _others(subject: ExplainedPlan, step: int, stacks: Sequence[LayerStack]) -> tuple[str, ...]:
    names = step_names(subject.plan, step)
    return tuple(name for name in names if all(layer_of_name(name, stack.name) is None for stack in stacks))
