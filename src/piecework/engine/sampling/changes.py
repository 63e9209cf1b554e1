"""What changes a sequence's logits before a token is drawn: min_tokens, logit bias and penalties.

All of it touches few tokens of a row, so it is kept as lists of tokens and applied to all rows at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray

from piecework.engine.sampling.candidates import Logits
from piecework.engine.sampling_params import SamplingParams


@final
class TokenCounts:
    """Which tokens are in a sequence, and how often each was generated. Grows with the sequence."""

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        first = np.fromiter(dict.fromkeys(prompt), dtype=np.int64)
        self._size = len(first)
        self._places = {int(token): place for place, token in enumerate(first)}
        self._tokens = np.resize(first, max(64, 2 * self._size)) if self._size else np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(len(self._tokens), dtype=np.float32)
        self._num_generated = 0

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The different tokens."""
        return self._tokens[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `tokens` was generated; 0 for one that only the prompt has."""
        return self._counts[: self._size]

    def follow(self, generated: Sequence[int]) -> None:
        """Take in the tokens that were generated since the last call."""
        for token in generated[self._num_generated :]:
            place = self._places.get(token)
            if place is None:
                place = self._add(token)
            self._counts[place] += 1.0
        self._num_generated = len(generated)

    def _add(self, token: int) -> int:
        place = self._places[token] = self._size
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token
        self._size += 1
        return place


@dataclass
class Changes:
    """What one sequence's parameters do to its logits."""

    params: SamplingParams
    banned: NDArray[np.int64]
    bias_tokens: NDArray[np.int64]
    bias_values: NDArray[np.float32]
    counts: TokenCounts | None = field(default=None)


def changes_of(params: SamplingParams, *, prompt: Sequence[int], eos_token_ids: Sequence[int]) -> Changes:
    """Return what the parameters do to a sequence that starts with `prompt`."""
    ends = (*eos_token_ids, *params.stop_token_ids)
    counts = None
    if params.penalised:
        counts = TokenCounts(prompt if params.repetition_penalty != 1.0 else ())
    return Changes(
        params=params,
        banned=np.fromiter(ends if params.min_tokens else (), dtype=np.int64),
        bias_tokens=np.fromiter(params.logit_bias.keys(), dtype=np.int64),
        bias_values=np.fromiter(params.logit_bias.values(), dtype=np.float32),
        counts=counts,
    )


def apply_changes(logits: Logits, changes: Sequence[tuple[int, Changes, Sequence[int]]]) -> None:
    """Change logits [rows, vocab] in place.

    Args:
        logits: float32.
        changes: row, what to change in it, and the tokens that its sequence generated so far.
    """
    banned = [(row, one.banned) for row, one, generated in changes if len(generated) < one.params.min_tokens]
    if banned:
        logits[_rows(banned), np.concatenate([tokens for _, tokens in banned])] = -np.inf
    biased = [(row, one.bias_tokens) for row, one, _ in changes if len(one.bias_tokens)]
    if biased:
        values = np.concatenate([one.bias_values for _, one, _ in changes])
        logits[_rows(biased), np.concatenate([tokens for _, tokens in biased])] += values
    penalised = []
    for row, one, generated in changes:
        if one.counts is not None:
            one.counts.follow(generated)
            penalised.append((row, one.params, one.counts))
    if penalised:
        _penalise(logits, penalised)


def _penalise(logits: Logits, penalised: Sequence[tuple[int, SamplingParams, TokenCounts]]) -> None:
    """Apply the repetition penalty, then the frequency and the presence penalty."""
    sizes = [len(counts.tokens) for _, _, counts in penalised]
    rows = np.repeat([row for row, _, _ in penalised], sizes)
    tokens = np.concatenate([counts.tokens for _, _, counts in penalised])
    times = np.concatenate([counts.counts for _, _, counts in penalised])
    penalties = np.array(
        [[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for _, p, _ in penalised], dtype=np.float32
    )
    repetition, frequency, presence = np.repeat(penalties, sizes, axis=0).T
    values = logits[rows, tokens]
    values = np.where(values > 0.0, values / repetition, values * repetition)
    logits[rows, tokens] = values - frequency * times - presence * (times > 0.0)


def _rows(lists: Sequence[tuple[int, NDArray[np.int64]]]) -> NDArray[np.int64]:
    return np.repeat([row for row, _ in lists], [len(tokens) for _, tokens in lists])
