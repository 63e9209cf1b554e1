"""The likeliest tokens of each row, without sorting the vocabulary.

A row is cut into blocks; the k-th greatest of the blocks' maxima is a bound that at least k logits reach, and few more.
What reaches it is gathered and sorted: by falling logit, equal logits by rising token. That order decides ties wherever
tokens are cut off, so that the outcome depends on nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]

_MOST_PER_BLOCK: Final = 32
_BLOCKS_PER_CANDIDATE: Final = 4
_NO_KEY: Final = np.iinfo(np.int64).max
_LOW_BITS: Final = np.int64(0xFFFFFFFF)
_LOWEST: Final = np.finfo(np.float32).min


@dataclass(frozen=True)
class Candidates:
    """The tokens [rows, width] that reach a bound, likeliest first, with their logits; 0 and -inf past the count."""

    tokens: NDArray[np.int64]
    logits: Logits
    counts: NDArray[np.int64]


def lower_bounds(logits: Logits, counts: NDArray[np.int64]) -> Logits:
    """Return for each row a value [rows] that at least `counts` [rows] of its logits [rows, vocab] reach.

    Counts are 1 to vocab. Where more reach it than asked for, the caller cuts them off. Logits of -inf never do.
    """
    rows, vocab = logits.shape
    most = int(counts.max())
    per_block = min(_MOST_PER_BLOCK, vocab // (_BLOCKS_PER_CANDIDATE * most))
    maxima = logits if per_block < 2 else _block_maxima(logits, per_block=per_block)
    width = maxima.shape[1]
    greatest = np.partition(maxima, width - most, axis=1)[:, width - most :]
    greatest.sort(axis=1)
    bounds: Logits = greatest[np.arange(rows), most - counts]
    bounds[np.isnan(bounds)] = _LOWEST
    return np.maximum(bounds, _LOWEST)


def gather(logits: Logits, bounds: Logits) -> Candidates:
    """Return the tokens whose logits [rows, vocab] reach their row's bound [rows]."""
    rows, vocab = logits.shape
    places = np.flatnonzero(logits >= bounds[:, None])
    row, token = np.divmod(places, vocab)
    counts = np.bincount(row, minlength=rows)
    width = max(1, int(counts.max()))
    column = np.arange(len(places)) - (np.cumsum(counts) - counts)[row]
    keys = np.full((rows, width), _NO_KEY)
    keys[row, column] = (_falling(logits.reshape(-1)[places]) << 32) | token
    keys.sort(axis=1)
    values = _from_falling(keys >> 32)
    tokens = keys & _LOW_BITS
    past = np.arange(width) >= counts[:, None]
    values[past], tokens[past] = -np.inf, 0
    return Candidates(tokens, values, counts)


def _block_maxima(logits: Logits, *, per_block: int) -> Logits:
    """Return the maxima of disjoint blocks that together cover each row; a block's logits lie far apart."""
    rows, vocab = logits.shape
    blocks = vocab // per_block
    covered = blocks * per_block
    maxima: Logits = logits[:, :covered].reshape(rows, per_block, blocks).max(axis=1)
    rest = vocab - covered
    np.maximum(maxima[:, :rest], logits[:, covered:], out=maxima[:, :rest])
    return maxima


def _falling(values: Logits) -> NDArray[np.int64]:
    """Return integers of 32 bits that rise as the values fall."""
    bits = (values + np.float32(0.0)).view(np.int32)  # the sum makes 0.0 of -0.0
    return (~(bits ^ ((bits >> 31) & 0x7FFFFFFF))).astype(np.int64)


def _from_falling(integers: NDArray[np.int64]) -> Logits:
    bits = ~integers.astype(np.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(np.float32)
