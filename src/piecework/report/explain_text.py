"""How a report of `piecework explain` is written for people, section by section."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from piecework.report.lifting import OpLifting
from piecework.report.listing import short_operator
from piecework.report.pairs import PairedOp, PairedPiece, PairReport
from piecework.report.sharing import LayerGroup, PieceDifference, PieceSharing, StackSharing
from piecework.report.spelling import spell_count, spell_numbers

_FEW_GROUPS: Final = 8
_FEW_NAMES: Final = 3
_FEW_PIECES: Final = 16


def head_line(title: str, text: str) -> str:
    """Return a line of the head, its text in the second column."""
    return f"{title:<14} {text}"


def pieces_section(pieces: Sequence[PieceSharing], stacks: Sequence[StackSharing], *, everything: bool) -> str:
    """Return the table of unique pieces and their users."""
    shown = pieces if everything else pieces[:_FEW_PIECES]
    width = max((len(piece.letter) for piece in shown), default=1)
    lines = ["unique pieces"]
    for piece in shown:
        users = [f"{_layers(numbers)}{_of(stack, among=stacks)}" for stack, numbers in piece.layers.items()]
        users += [f"leads into layer {number}{_of(stack, among=stacks)}" for stack, number in piece.leads_into.items()]
        users += [f"with {_few(piece.others)}"] if piece.others else []
        users += [f"for {' and '.join(piece.forwards)} only"] if piece.forwards else []
        head = f"  {piece.letter:<{width}} {piece.num_uses:>4} × {piece.fingerprint[:12]}"
        size = f"{spell_count(piece.num_ops, 'op')}, {spell_count(piece.num_constants, 'constant')}"
        lines.append(f"{head}  {size:<24} {', '.join(users)}".rstrip())
    if len(shown) < len(pieces):
        lines.append(f"  … and {len(pieces) - len(shown)} more (--all)")
    return "\n".join(lines) if pieces else ""


def groups_section(stack: StackSharing, *, everything: bool) -> str:
    """Return which layers share their pieces, and the first difference of those that don't."""
    lines = [stack.name or "the module's elements"]
    if len(stack.groups) > 1 and all(len(group.layers) == 1 for group in stack.groups):
        lines.append("  no two layers share all their pieces")
    shown = stack.groups if everything else stack.groups[:_FEW_GROUPS]
    for group in shown:
        lines += _group_lines(group, everything=everything, alone=len(group.layers) == 1 and len(stack.groups) > 1)
    if left := stack.groups[len(shown) :]:
        layers = sorted(number for group in left for number in group.layers)
        lines.append(f"  {_layers(layers)}: in {len(left)} more groups (--all)")
    for letter, numbers in stack.uncut.items():
        lines.append(f"  {_layers(numbers)} are in one piece, {letter}: no opaque op stands between them")
    if stack.spans and len(stack.groups) > 1:
        lines.append("  (a piece that reaches from one layer into the next counts as the former's)")
    return "\n".join(lines)


def ops_section(ops: Sequence[OpLifting]) -> str:
    """Return the opaque ops with what differs between their calls."""
    lines = ["opaque ops"]
    for op in ops:
        at = f" at {', '.join(op.locations[:_FEW_NAMES])}" if op.locations else ""
        lines.append(f"{op.num_calls:>6} × {short_operator(op.op)}{at}")
        for argument in op.lifted:
            examples = ", ".join(argument.examples) + (", …" if argument.num_values > len(argument.examples) else "")
            kind = spell_count(argument.num_values, f"different {argument.kind}")
            lines.append(f"         {argument.label}: {kind} at no cost: {examples}")
    return "\n".join(lines) if ops else ""


def pair_section(pair: PairReport) -> str:
    """Return two layers side by side."""
    a, b = pair.layers
    lines = [f"layers {a} and {b} of {pair.stack or 'the module'}"]
    for piece in pair.pieces:
        lines += _paired_piece(piece, pair.layers)
    for op in pair.ops:
        lines += _paired_op(op, pair.layers)
    return "\n".join(lines)


def _group_lines(group: LayerGroup, *, everything: bool, alone: bool) -> Iterator[str]:
    layers = _layers(group.layers)
    pieces = f"{spell_count(len(group.pieces), 'piece')}: {' '.join(group.pieces)}"
    if group.reference is None:
        yield f"  {layers} {'has' if alone or len(group.layers) == 1 else 'share'} {pieces}"
        return
    own, other = len(group.pieces), len(group.reference_pieces)
    differs = "differs" if len(group.layers) == 1 else f"share {pieces}; they differ"
    counts = f" in having {spell_count(own, 'piece')}, not {other}" if own != other else ""
    if not group.differences:
        yield f"  {layers} {differs} from layer {group.reference}{counts}"
        return
    first, *more = group.differences
    joined = "; the first that differs is" if counts else " in"
    yield f"  {layers} {differs} from layer {group.reference}{counts}{joined} {_place(first, own=max(own, other))}"
    yield from _difference_lines(first)
    if more and not everything:
        yield f"      and in {spell_count(len(more), 'more piece')} (--all)"
    for difference in more if everything else ():
        yield f"    and in {_place(difference, own=own)}"
        yield from _difference_lines(difference)


def _place(difference: PieceDifference, *, own: int) -> str:
    place = f"piece {difference.place}" if own > 1 else "its piece"
    return f"{place}: {difference.piece}, not {difference.other}"


def _difference_lines(difference: PieceDifference) -> Iterator[str]:
    where = "" if difference.layer is None else f"in the beginning of layer {difference.layer}: "
    yield f"      {where}{difference.text}"
    if difference.extra:
        yield f"      {difference.piece} also has {_few(difference.extra)}, of no layer"


def _paired_piece(piece: PairedPiece, layers: tuple[int, int]) -> Iterator[str]:
    (x, y), (held_x, held_y) = piece.pieces, piece.holders
    if not x or not y:
        yield f"  piece {piece.place}: {x or y}, of layer {layers[0] if x else layers[1]} only"
        return
    spans = [f"{letter} reaches over {_layers(held)}" for letter, held in ((x, held_x), (y, held_y)) if len(held) > 1]
    note = f" ({'; '.join(dict.fromkeys(spans))})" if spans else ""
    if x == y:
        yield f"  piece {piece.place}: {x}, shared"
        return
    yield f"  piece {piece.place}: {x} against {y}{note}"
    yield f"      {piece.difference}"


def _paired_op(op: PairedOp, layers: tuple[int, int]) -> Iterator[str]:
    x, y = (short_operator(name) for name in op.ops)
    if not x or not y:
        yield f"  opaque op {op.place}: {x or y}, of layer {layers[0] if x else layers[1]} only"
    elif x != y:
        yield f"  opaque op {op.place}: {x} against {y}"
    else:
        yield f"  opaque op {op.place}: {x}" + ("" if op.differing else ", the same in both")
    for label, mine, theirs in op.differing:
        yield f"      {label}: {mine} against {theirs}, at no cost"


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' if len(numbers) > 1 else ''} {spell_numbers(numbers)}"


def _of(stack: str, *, among: Sequence[StackSharing]) -> str:
    return f" of {stack or 'the module'}" if len(among) > 1 else ""


def _few(names: Sequence[str]) -> str:
    more = len(names) - _FEW_NAMES
    return ", ".join(names[:_FEW_NAMES]) + (f" and {more} more" if more > 0 else "")
