"""Requests with the lengths of recorded chats, all sent at once: what they are, and what their times come to."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

_FIRST_TOKEN: Final = 300  # smaller ones may be special
_LEAST: Final = 4
_INPUT_SIGMA: Final = 1.1
_OUTPUT_SIGMA: Final = 0.8

Chat = tuple[list[int], int]
"""A prompt, and how many tokens shall follow."""


@dataclass(frozen=True)
class ChatLoad:
    """How many requests, the means of their lengths (as ShareGPT's first turns have them), and the longest of all."""

    requests: int = 128
    input: int = 220
    output: int = 200
    max_length: int = 2048

    def draw(self, *, vocab: int) -> list[Chat]:
        """Return prompts of random tokens and the lengths of their continuations, always the same ones.

        Lengths are log-normal, as in recorded chats: many short requests, a few long ones. The logarithm's standard
        deviation is 1.1 for prompts and 0.8 for continuations; a prompt has 4 tokens to half of the longest request, a
        continuation 4 to what is left.
        """
        lengths, tokens = random.Random(0), random.Random("prompts 0")
        drawn = []
        for _ in range(self.requests):
            prompt = min(max(_log_normal(lengths, self.input, _INPUT_SIGMA), _LEAST), max(1, self.max_length // 2))
            continuation = max(_log_normal(lengths, self.output, _OUTPUT_SIGMA), _LEAST)
            drawn.append((prompt, min(continuation, self.max_length - prompt)))
        low = min(_FIRST_TOKEN, vocab // 2)
        return [([tokens.randrange(low, vocab) for _ in range(prompt)], output) for prompt, output in drawn]


@dataclass(frozen=True)
class Outcome:
    """What became of a request, in seconds: when it was sent after the first one, and from then to each token."""

    begin_s: float
    token_s: tuple[float, ...]
    output_tokens: int


def figures_of(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return throughput, and mean, median and 99th percentile of latencies, under the names that vLLM gives them.

    TTFT is the time to a request's first token, TPOT its time per token after that, ITL the time between two tokens.
    """
    duration_s = max(outcome.begin_s + outcome.token_s[-1] for outcome in outcomes)
    latencies = {
        "ttft": [outcome.token_s[0] for outcome in outcomes],
        "tpot": [(o.token_s[-1] - o.token_s[0]) / (o.output_tokens - 1) for o in outcomes if o.output_tokens > 1],
        "itl": [after - before for outcome in outcomes for before, after in pairwise(outcome.token_s)],
    }
    made = {
        "request_throughput": len(outcomes) / duration_s,
        "output_throughput": sum(outcome.output_tokens for outcome in outcomes) / duration_s,
    }
    for name, seconds in latencies.items():
        made |= {f"{statistic}_{name}_ms": 1e3 * value for statistic, value in _spread(seconds).items()}
    return made


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"mean": statistics.fmean(values), "median": statistics.median(values), "p99": percentile(values, 99.0)}


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile of values, interpolated linearly between the two nearest ones."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _log_normal(drawn: random.Random, mean: int, sigma: float) -> int:
    return round(drawn.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))
