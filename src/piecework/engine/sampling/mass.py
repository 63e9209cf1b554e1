"""Running sums over the probabilities of whole rows, in one pass over the logits.

Only sums of blocks are kept. A place inside a block is found from that block's logits alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from piecework.engine.sampling.candidates import Logits

_PER_BLOCK: Final = 256
_AT_ONCE: Final = 2**17
"""How many logits are worked on at a time, so that what is in between stays in the CPU's cache."""


@dataclass(frozen=True)
class Place:
    """A place in each row: its column [rows], and the sum up to and with it [rows]."""

    columns: NDArray[np.int64]
    sums: NDArray[np.float64]


@dataclass(frozen=True)
class Mass:
    """The weights exp((logit - greatest) / temperature) of rows, summed up by block; made by `mass_of`.

    Attributes:
        logits: [rows, vocab], as given.
        greatest: [rows, 1], 0 where it is infinite or NaN.
        scale: 1 / temperature, [rows, 1].
        running: sums of all blocks up to each, [rows, blocks], float64.
    """

    logits: Logits
    greatest: Logits
    scale: Logits
    running: NDArray[np.float64]

    @property
    def totals(self) -> NDArray[np.float64]:
        """The sum of each row's weights."""
        return self.running[:, -1]

    def passing(self, targets: NDArray[np.float64]) -> Place:
        """Return where each row's running sum first is greater than its target [rows], which is below its total."""
        return self._locate(targets, side="right")

    def reaching(self, targets: NDArray[np.float64]) -> Place:
        """Return where each row's running sum first is its target [rows] or greater."""
        return self._locate(targets, side="left")

    def _locate(self, targets: NDArray[np.float64], *, side: str) -> Place:
        rows, vocab = np.arange(len(self.logits)), self.logits.shape[1]
        block = _first(self.running, targets, side=side)
        before = np.where(block > 0, self.running[rows, block - 1], 0.0)
        columns = block[:, None] * _PER_BLOCK + np.arange(_PER_BLOCK)
        logits = self.logits[rows[:, None], np.minimum(columns, vocab - 1)]
        weights = np.exp((logits - self.greatest) * self.scale).astype(np.float64)
        weights[columns >= vocab] = 0.0
        inside = np.cumsum(weights, axis=1)
        # a block's sum differs from `inside` in the last digits: what is left to go is taken as a share of it
        block_sum = self.running[rows, block] - before
        unit = np.divide(inside[:, -1], block_sum, out=np.ones_like(block_sum), where=block_sum > 0.0)
        place = _first(inside, np.minimum((targets - before) * unit, inside[:, -1]), side=side)
        found = np.minimum(block * _PER_BLOCK + place, vocab - 1)
        return Place(found, before + inside[rows, place] / np.where(unit > 0.0, unit, 1.0))


def mass_of(logits: Logits, temperature: NDArray[np.float64]) -> Mass:
    """Return the mass of logits [rows, vocab] at temperatures [rows] above 0."""
    rows, vocab = logits.shape
    greatest = logits.max(axis=1, keepdims=True)
    greatest = np.where(np.isfinite(greatest), greatest, np.float32(0.0))
    scale = (1.0 / temperature).astype(np.float32)[:, None]
    whole = vocab // _PER_BLOCK
    covered = whole * _PER_BLOCK
    sums = np.zeros((rows, whole + 1))
    step = max(1, _AT_ONCE // vocab)
    buffer = np.empty((min(step, rows), vocab), dtype=np.float32)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        weights = np.subtract(logits[part], greatest[part], out=buffer[: part.stop - start])
        weights *= scale[part]
        np.exp(weights, out=weights)
        sums[part, :whole] = weights[:, :covered].reshape(len(weights), whole, _PER_BLOCK).sum(axis=2)
        sums[part, whole] = weights[:, covered:].sum(axis=1)
    return Mass(logits, greatest, scale, np.cumsum(sums, axis=1))


def _first(running: NDArray[np.float64], targets: NDArray[np.float64], *, side: str) -> NDArray[np.int64]:
    """Return the first column whose running sum passes ("right") or reaches ("left") the row's target.

    Where none does, it is the column at which the sum gets to its total.
    """
    before = running <= targets[:, None] if side == "right" else running < targets[:, None]
    last = (running >= running[:, -1:]).argmax(axis=1)
    first: NDArray[np.int64] = np.minimum(before.sum(axis=1), last)
    return first
