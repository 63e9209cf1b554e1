"""Draw one token per row from temperature, min-p, top-k and top-p, with one random number per row.

The distribution is a prefix of the tokens in the order of `candidates`. Only rows without any filter, and rows whose
top-p takes in more tokens than were gathered, need the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from piecework.engine.sampling.candidates import Candidates, Logits, gather, lower_bounds
from piecework.engine.sampling.mass import mass_of

_FEW: Final = 256
"""How many tokens are gathered first where nothing but top-p says how many are needed."""


@dataclass(frozen=True)
class Filters:
    """What to draw from, each [rows]: temperatures above 0, top_k with 0 for all, top_p, min_p."""

    temperature: NDArray[np.float64]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]

    def of(self, rows: NDArray[np.int64]) -> Filters:
        """Return the filters of some rows."""
        return Filters(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows])


def draw(logits: Logits, filters: Filters, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return tokens [rows] drawn from logits [rows, vocab] with the random numbers [rows] in [0, 1)."""
    limited = _limited(filters, vocab=logits.shape[1])
    filtered = limited | (filters.top_p < 1.0) | (filters.min_p > 0.0)
    # rows that need many candidates would make all others of their group wide
    wide = limited & (filters.top_k > _FEW)
    tokens = np.zeros(len(logits), dtype=np.int64)
    for group, function in ((filtered & ~wide, _draw_filtered), (wide, _draw_filtered), (~filtered, _draw_any)):
        rows = np.flatnonzero(group)
        if len(rows) == len(logits):
            return function(logits, filters, uniforms)
        if len(rows):
            tokens[rows] = function(logits[rows], filters.of(rows), uniforms[rows])
    return tokens


def _draw_filtered(logits: Logits, filters: Filters, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Draw from rows with at least one filter."""
    vocab = logits.shape[1]
    limited = _limited(filters, vocab=vocab)
    open_ended = ~limited & (filters.min_p <= 0.0)
    found = gather(logits, _bounds(logits, filters, limited=limited, open_ended=open_ended))
    weights = np.exp((found.logits - found.logits[:, :1]) / filters.temperature[:, None])  # float64
    weights[~(weights >= filters.min_p[:, None])] = 0.0
    weights[limited[:, None] & (np.arange(weights.shape[1]) >= filters.top_k[:, None])] = 0.0
    sums = np.cumsum(weights, axis=1)
    totals = sums[:, -1].copy()
    rows = np.flatnonzero(open_ended)
    if len(rows):
        part = logits if len(rows) == len(logits) else logits[rows]
        totals[rows] = mass_of(part, filters.temperature[rows]).totals
    reach = filters.top_p * totals
    ends = np.where(filters.top_p < 1.0, (sums < reach[:, None]).sum(axis=1), weights.shape[1])
    tokens = _pick(found, sums, ends=ends, uniforms=uniforms)
    rows = np.flatnonzero(open_ended & (found.counts < vocab) & (ends >= found.counts))
    if len(rows):
        tokens[rows] = _draw_nucleus(logits[rows], filters.of(rows), uniforms[rows])
    return tokens


def _bounds(logits: Logits, filters: Filters, *, limited: NDArray[np.bool_], open_ended: NDArray[np.bool_]) -> Logits:
    """Return for each row a logit that all tokens reach that might be drawn, or most of them where it is open-ended."""
    vocab = logits.shape[1]
    bounds = np.full(len(logits), np.finfo(np.float32).min, dtype=np.float32)
    counted = np.flatnonzero(limited | open_ended)
    if len(counted):
        counts = np.where(limited, filters.top_k, min(_FEW, vocab))[counted]
        bounds[counted] = lower_bounds(logits if len(counted) == len(logits) else logits[counted], counts)
    relative = np.flatnonzero(filters.min_p > 0.0)
    if len(relative):
        # a little less, because the real comparison is between probabilities
        least = filters.temperature[relative] * (np.log(filters.min_p[relative]) - 1e-3)
        greatest = logits[relative].max(axis=1)
        least = greatest + np.minimum(least, -1e-5 * np.abs(greatest))
        bounds[relative] = np.fmax(bounds[relative], least)
    return bounds


def _pick(
    found: Candidates, sums: NDArray[np.float64], *, ends: NDArray[np.int64], uniforms: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the token at which the sums of weights pass uniform × the sum up to and with place `ends`."""
    rows = np.arange(len(sums))
    ends = np.minimum(ends, np.maximum(found.counts - 1, 0))
    reach = uniforms * sums[rows, ends]
    places = np.minimum((sums <= reach[:, None]).sum(axis=1), ends)
    tokens: NDArray[np.int64] = found.tokens[rows, places]
    return tokens


def _draw_any(logits: Logits, filters: Filters, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Draw from all tokens of each row."""
    mass = mass_of(logits, filters.temperature)
    return mass.passing(uniforms * mass.totals).columns


def _draw_nucleus(logits: Logits, filters: Filters, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Draw from the top-p of each row by sorting all its logits; the tokens are looked up by logit afterwards."""
    rising = np.sort(logits, axis=1)
    falling = rising[:, ::-1]
    mass = mass_of(falling, filters.temperature)
    nucleus = mass.reaching(filters.top_p * mass.totals)
    places = mass.passing(uniforms * nucleus.sums).columns
    places = np.minimum(places, nucleus.columns)
    tokens = np.zeros(len(logits), dtype=np.int64)
    for row, place in enumerate(places):
        value = falling[row, place]
        num_greater = logits.shape[1] - int(np.searchsorted(rising[row], value, side="right"))
        tokens[row] = np.flatnonzero(logits[row] == value)[place - num_greater]
    return tokens


def _limited(filters: Filters, *, vocab: int) -> NDArray[np.bool_]:
    """Return whether top-k leaves tokens out."""
    limited: NDArray[np.bool_] = (filters.top_k > 0) & (filters.top_k < vocab)
    return limited
