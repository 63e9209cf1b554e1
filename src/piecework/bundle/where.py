"""Which batches a forward is for, by their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from piecework.foundation.reading import items, mapping, text, whole


@dataclass(frozen=True)
class Where:
    """A condition on a batch's sizes: all of it holds for the batches that a forward is for.

    Attributes:
        equal: pairs of sizes that are equal.
        within: sizes, each with the least and the greatest value that it has.
    """

    equal: tuple[tuple[str, str], ...] = ()
    within: tuple[tuple[str, int, int], ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """The sizes that it is about."""
        return frozenset(name for pair in self.equal for name in pair) | {name for name, _, _ in self.within}

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether a batch of these sizes is one of them."""
        for size, low, high in self.within:
            if not low <= sizes[size] <= high:
                return False
        return all(sizes[size] == sizes[other] for size, other in self.equal)

    def also(self, size: str, low: int, high: int) -> Where:
        """Return the condition that holds where this one does and `size` is from `low` to `high`."""
        before = {name: (least, most) for name, least, most in self.within}
        least, most = before.get(size, (low, high))
        found = before | {size: (max(low, least), min(high, most))}
        return Where(self.equal, tuple((name, *bounds) for name, bounds in found.items()))

    def text(self) -> str:
        """Return it for people: "rows = 1 and length from 64 to 512"."""
        return " and ".join([*(f"{size} = {other}" for size, other in self.equal), *map(spell_range, self.within)])

    def to_json(self) -> dict[str, Any]:
        """Return it as data."""
        return {
            **({"equal": [list(pair) for pair in self.equal]} if self.equal else {}),
            **({"within": {name: [low, high] for name, low, high in self.within}} if self.within else {}),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Where:
        """Read `equal` and `within` of what `to_json` wrote. Raises ValueError where they are something else."""
        pairs = [items(pair, "equal", length=2) for pair in items(data.get("equal", []), "equal")]
        ranges = mapping(data.get("within", {}), "within")
        return Where(
            equal=tuple((text(size, "equal"), text(other, "equal")) for size, other in pairs),
            within=tuple((text(name, "within"), *read_bounds(bounds, "within")) for name, bounds in ranges.items()),
        )


def read_bounds(value: object, what: str) -> tuple[int, int]:
    """Read the least and the greatest value of a size. Raises ValueError where they are none."""
    low, high = (whole(n, what) for n in items(value, what, length=2))
    if low > high:
        raise ValueError(f"{what}: from {low} to {high}")
    return low, high


def spell_range(given: tuple[str, int, int]) -> str:
    """Return a size and its range for people: "rows = 1", "length from 64 to 512"."""
    name, low, high = given
    return f"{name} = {low}" if low == high else f"{name} from {low} to {high}"
