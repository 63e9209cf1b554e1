"""Random numbers that are a function of seed, sequence and step, so that no state has to survive anything.

A sequence's stream is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) from a
starting point that is a hash of seed and sequence index; the numbers of a stream can be read at any step.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)
_FIRST: Final = np.uint64(0xBF58476D1CE4E5B9)
_SECOND: Final = np.uint64(0x94D049BB133111EB)
_BITS: Final = 2**64 - 1


def stream_start(seed: int, index: int) -> int:
    """Return where the stream of a request's `index`-th sequence starts, 0 <= start < 2**64."""
    hashed = _mix(np.array([seed & _BITS], dtype=np.uint64) + _GAMMA)
    return int(_mix((hashed ^ np.uint64(index)) + _GAMMA)[0])


def uniforms(starts: NDArray[np.uint64], steps: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return the number of each stream at its step, in [0, 1): starts [rows], steps [rows] -> [rows]."""
    bits = _mix(starts + (steps + np.uint64(1)) * _GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))
