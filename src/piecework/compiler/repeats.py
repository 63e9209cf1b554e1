"""Find where the parts of a run of nodes repeat: the boundaries of blocks that have no step in them.

A run between two steps (compiler/split.py) may hold many equal blocks, one after the other: of a `ModuleList`, a
`Sequential`, or of a model that calls `block_0`, `block_1`, … by name; of a graph of Dynamo's as well, which has no
modules. So the nodes themselves are compared, by what each looks like. Whether two parts are one piece is found out
later, by their programs (compiler/deduplicate.py).

Parts without a product of matrices stay together: there, one loop over all that is computed element by element is worth
more than what is compiled once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

import torch

from piecework.capture.tape import metadata
from piecework.foundation.torch_private import operator_name
from piecework.ops.head_matmul import HEAD_MATMUL_OP
from piecework.ops.linear import LINEAR_OP

MIN_SAVED: Final = 16
"""Operators that needn't be compiled again for a cut to be worth the calls of its pieces (docs/decisions.md)."""
_PRODUCTS: Final = frozenset(
    {LINEAR_OP, HEAD_MATMUL_OP}
    | {f"aten::{name}" for name in ("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "convolution")}
)
_MOST_APART: Final = 8
_MOST_PERIODS: Final = 32


@dataclass(frozen=True)
class Repeat:
    """Equal parts, one after the other: `count` parts of `length` nodes from position `begin`."""

    begin: int
    length: int
    count: int

    @property
    def end(self) -> int:
        """The position after the last part."""
        return self.begin + self.length * self.count

    @property
    def saved(self) -> int:
        """How many nodes are those of another part again."""
        return self.length * (self.count - 1)


def cut_repeats(
    nodes: Sequence[torch.fx.Node], *, weights: Container[torch.fx.Node]
) -> Iterator[Sequence[torch.fx.Node]]:
    """Yield a run of nodes in parts, so that equal parts are pieces of their own; as a whole where nothing repeats.

    Args:
        nodes: a run, in order.
        weights: the graph's inputs that are weights.
    """
    positions = _search(nodes, weights).cuts(0, len(nodes))
    for begin, end in pairwise([0, *sorted(positions - {0, len(nodes)}), len(nodes)]):
        yield nodes[begin:end]


def why_whole(nodes: Sequence[torch.fx.Node], *, weights: Container[torch.fx.Node]) -> str:
    """Return why `cut_repeats` leaves a run of nodes as a whole, in words."""
    return _search(nodes, weights).why_none()


def _search(nodes: Sequence[torch.fx.Node], weights: Container[torch.fx.Node]) -> _Search:
    names: dict[str, int] = {}
    return _Search(nodes, [names.setdefault(_token(node, weights), len(names)) for node in nodes])


def _token(node: torch.fx.Node, weights: Container[torch.fx.Node]) -> str:
    """Return what a node of an equal part has as well: its operator, constants, and what its tensors look like."""

    def argument(value: object) -> object:
        if isinstance(value, torch.fx.Node):
            return (value in weights, metadata(value.meta.get("val")))
        if isinstance(value, (list, tuple)):
            return tuple(argument(v) for v in value)
        return (type(value).__name__, repr(value))

    given = tuple(argument(a) for a in node.args), tuple((k, argument(v)) for k, v in sorted(node.kwargs.items()))
    return repr((node.target, given, metadata(node.meta.get("val"))))


class _Search:
    """Where to cut a run of nodes that look as `tokens` say."""

    def __init__(self, nodes: Sequence[torch.fx.Node], tokens: Sequence[int]) -> None:
        self._nodes = nodes
        self._tokens = tokens
        self._crossing = self._count_crossing()
        self._products = [0, *accumulate(_is_product(node) for node in nodes)]

    def cuts(self, begin: int, end: int) -> set[int]:
        """Return the positions of the nodes in [begin, end) that begin a part; in equal parts they are the same."""
        best = self._best(begin, end)
        if best is None:
            return set()
        inside = {best.begin, *self.cuts(best.begin, best.begin + best.length)}
        repeated = {position + best.length * number for number in range(best.count) for position in inside}
        return {best.end, *repeated, *self.cuts(begin, best.begin), *self.cuts(best.end, end)}

    def _best(self, begin: int, end: int) -> Repeat | None:
        """Return the repeat in [begin, end) that saves most, cut where the fewest tensors cross."""
        worth = [r for r in self._repeats(begin, end) if r.saved >= MIN_SAVED and self._has_product(r)]
        if not worth:
            return None
        # of two that save as much, the one with the shorter parts
        return self._in_phase(max(worth, key=lambda repeat: (repeat.saved, -repeat.length)), end)

    def why_none(self) -> str:
        """Return why the whole run has no cut, in words."""
        repeats = list(self._repeats(0, len(self._nodes)))
        most = max((r.saved for r in repeats), default=0)
        if most >= MIN_SAVED:
            return "what repeats has no product of matrices, and is worth more as one loop"
        if not repeats:
            return "no two parts of it are equal"
        return f"its equal parts would save {most} operators, and less than {MIN_SAVED} are not worth a cut"

    def _repeats(self, begin: int, end: int) -> Iterator[Repeat]:
        """Yield the longest runs of equal parts in [begin, end), for distances at which equal nodes often stand."""
        for period in self._periods(begin, end):
            for start, same in self._equal_runs(begin, end, period):
                if same >= period:
                    yield Repeat(start, period, 1 + same // period)

    def _has_product(self, repeat: Repeat) -> bool:
        return self._products[repeat.begin + repeat.length] > self._products[repeat.begin]

    def _periods(self, begin: int, end: int) -> list[int]:
        """Return distances at which equal nodes often stand."""
        places: dict[int, list[int]] = defaultdict(list)
        for position in range(begin, end):
            places[self._tokens[position]].append(position)
        distances = Counter(
            later - sooner
            for found in places.values()
            for apart in range(1, _MOST_APART + 1)
            for sooner, later in zip(found, found[apart:], strict=False)
        )
        return [distance for distance, _ in distances.most_common(_MOST_PERIODS)]

    def _equal_runs(self, begin: int, end: int, period: int) -> list[tuple[int, int]]:
        """Return (first position, how many) of the nodes in a row that are equal to the one a period later."""
        differ = [i for i in range(begin, end - period) if self._tokens[i] != self._tokens[i + period]]
        edges = [begin - 1, *differ, end - period]
        return [(sooner + 1, later - sooner - 1) for sooner, later in pairwise(edges)]

    def _in_phase(self, repeat: Repeat, end: int) -> Repeat:
        """Return the repeat begun up to a period later, where the fewest tensors go from one part to the next."""
        last = repeat.begin
        while last + repeat.length < end and self._tokens[last] == self._tokens[last + repeat.length]:
            last += 1
        last += repeat.length
        shifted = [
            Repeat(repeat.begin + by, repeat.length, (last - repeat.begin - by) // repeat.length)
            for by in range(repeat.length)
        ]
        fitting = [r for r in shifted if r.saved >= MIN_SAVED and r.count >= max(2, repeat.count - 1)]
        return min(fitting, key=lambda r: (self._crossing[r.begin + r.length], -r.count, r.begin))

    def _count_crossing(self) -> list[int]:
        """Return for each position how many tensors are made before it and read at it or after."""
        places = {node: position for position, node in enumerate(self._nodes)}
        change = [0] * (len(self._nodes) + 1)
        for position, node in enumerate(self._nodes):
            uses = [places[user] for user in node.users if user in places]
            if uses:
                change[position + 1] += 1
                change[max(uses) + 1] -= 1
        return list(accumulate(change))


def _is_product(node: torch.fx.Node) -> bool:
    name = operator_name(node.target)
    return name is not None and name.partition(".")[0] in _PRODUCTS
