"""What is sent to a server, and when: lengths, arrivals and prompts of requests. All of it follows from a seed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

_FIRST_TOKEN: Final = 300  # smaller ones may be special
_LEAST: Final = 4
_INPUT_SIGMA: Final = 1.1
_OUTPUT_SIGMA: Final = 0.8
_WORDS: Final = (
    *("the", "of", "and", "a", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with"),
    *("his", "they", "at", "be", "this", "have", "from", "or", "one", "had", "by", "word", "but", "not", "what", "all"),
    *("were", "we", "when", "your", "can", "said", "there", "use", "an", "each", "which", "she", "do", "how", "their"),
    *("if", "will", "up", "other", "about", "out", "many", "then", "them", "these", "so", "some", "her", "would"),
)


class Lengths(Enum):
    """How lengths are distributed around the means that the user gives.

    FIXED: none differs. RANDOM: evenly from half of the mean to one and a half. SHAREGPT: log-normal, as in recorded
    chats: many short requests, a few long ones. The logarithm's standard deviation is 1.1 for prompts and 0.8 for
    continuations; lengths are from 4 tokens to half of the longest request for a prompt, and to what that leaves for
    its continuation.
    """

    FIXED = "fixed"
    RANDOM = "random"
    SHAREGPT = "sharegpt"


Chat = tuple[list[int], int]
"""A prompt, and how many tokens shall follow."""

# the means of ShareGPT's first turns, as serving benchmarks filter them
DEFAULT_MEANS: Final = {Lengths.FIXED: (128, 64), Lengths.RANDOM: (128, 64), Lengths.SHAREGPT: (220, 200)}


@dataclass(frozen=True)
class RequestLengths:
    """Tokens of a prompt, and of its continuation."""

    input: int
    output: int


def draw_lengths(
    shape: Lengths, *, count: int, input: int, output: int, max_length: int, seed: int
) -> list[RequestLengths]:
    """Return lengths of requests.

    Args:
        shape: of their distribution.
        count: how many.
        input, output: mean tokens of prompts and continuations (of a log-normal one: before it is cut off).
        max_length: most tokens of a prompt and its continuation together.
        seed: of the numbers drawn.
    """
    drawn = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = _length(drawn, shape, mean=input, sigma=_INPUT_SIGMA)
        continuation = _length(drawn, shape, mean=output, sigma=_OUTPUT_SIGMA)
        if shape is Lengths.SHAREGPT:
            prompt = min(max(prompt, _LEAST), max(1, max_length // 2))
            continuation = max(continuation, _LEAST)
        prompt = min(prompt, max_length - 1)
        made.append(RequestLengths(prompt, min(continuation, max_length - prompt)))
    return made


def draw_arrivals(*, count: int, rate: float, seed: int) -> list[float]:
    """Return the seconds at which requests are sent, from 0: a Poisson process of `rate` a second, or all at once."""
    if math.isinf(rate):
        return [0.0] * count
    drawn = random.Random(f"arrivals {seed}")
    return list(itertools.accumulate((drawn.expovariate(rate) for _ in range(count - 1)), initial=0.0))


def draw_tokens(lengths: Sequence[int], *, vocab: int, seed: int) -> list[list[int]]:
    """Return prompts of random tokens below `vocab`."""
    drawn = random.Random(f"prompts {seed}")
    low = min(_FIRST_TOKEN, vocab // 2)
    return [[drawn.randrange(low, vocab) for _ in range(length)] for length in lengths]


def draw_chats(count: int, *, input: int, output: int, max_length: int, vocab: int, seed: int) -> list[Chat]:
    """Return prompts of random tokens and the lengths of their continuations, both log-normal; see `draw_lengths`."""
    lengths = draw_lengths(Lengths.SHAREGPT, count=count, input=input, output=output, max_length=max_length, seed=seed)
    prompts = draw_tokens([length.input for length in lengths], vocab=vocab, seed=seed)
    return [(prompt, length.output) for prompt, length in zip(prompts, lengths, strict=True)]


def draw_texts(lengths: Sequence[int], *, tokens_per_word: float, seed: int) -> list[str]:
    """Return prompts of random English words that have about these numbers of tokens."""
    drawn = random.Random(f"prompts {seed}")
    return [" ".join(drawn.choices(_WORDS, k=max(1, round(length / tokens_per_word)))) for length in lengths]


def _length(drawn: random.Random, shape: Lengths, *, mean: int, sigma: float) -> int:
    match shape:
        case Lengths.FIXED:
            return mean
        case Lengths.RANDOM:
            return drawn.randint(math.ceil(mean / 2), mean + mean // 2)
        case Lengths.SHAREGPT:
            return round(drawn.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))
