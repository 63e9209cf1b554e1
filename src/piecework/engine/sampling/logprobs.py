"""Log-probabilities of chosen and of the likeliest tokens, from logits as the model gave them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from piecework.engine.output import Top
from piecework.engine.sampling.candidates import Logits, gather, lower_bounds
from piecework.engine.sampling.mass import mass_of

LEAST: Final = -9999.0
"""What stands for less, as in OpenAI's API: JSON has no infinity."""


def token_logprobs(logits: Logits, tokens: NDArray[np.int64], counts: Sequence[int]) -> list[tuple[float, Top]]:
    """Return for each row of the logits [rows, vocab] its token's log-probability and its likeliest tokens'.

    Args:
        logits: float32.
        tokens: [rows].
        counts: how many of the likeliest tokens, per row; at most all are given.
    """
    rows, vocab = logits.shape
    mass = mass_of(logits, np.ones(rows))
    norms = mass.greatest[:, 0] + np.log(mass.totals)
    chosen = np.fmax(logits[np.arange(rows), tokens] - norms, LEAST).tolist()
    wanted = np.minimum(np.array(counts, dtype=np.int64), vocab)
    tops: list[Top] = [()] * rows
    most = int(wanted.max(initial=0))
    if most:
        found = gather(logits, lower_bounds(logits, np.maximum(wanted, 1)))
        top_tokens = found.tokens[:, :most].tolist()
        top_logprobs = np.fmax(found.logits[:, :most] - norms[:, None], LEAST).tolist()
        tops = [
            tuple(zip(top_tokens[row][:count], top_logprobs[row][:count], strict=True))
            for row, count in enumerate(np.minimum(wanted, found.counts).tolist())
        ]
    return list(zip(chosen, tops, strict=True))
