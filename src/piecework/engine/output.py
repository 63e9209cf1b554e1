"""What an engine emits: for each step and each sequence that got a token, one `TokenOutput`. Works without torch.

`TextEngine` makes `TextDelta`s of them; those are what callers of `LLM.stream` and the server see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from piecework.engine.request import FinishReason

Top = tuple[tuple[int, float], ...]
"""The likeliest tokens at one place with their log-probabilities, likeliest first."""


class SampledToken(NamedTuple):
    """A chosen token; where logprobs were asked for, its own and those of the likeliest tokens, likeliest first."""

    token: int
    logprob: float | None = None
    top: Top = ()


class TokenOutput(NamedTuple):
    """A generated token.

    Attributes:
        request_id, index: of which request, which of its continuations.
        sampled: the token, with logprobs where asked for.
        finish_reason: why it is the continuation's last, if it is.
        ends_request: whether it is the last of all of the request's continuations.
        num_cached: how many of the prompt's tokens were found in the KV cache; said with the first token.
        prompt_logprobs: with the first token of continuation 0 where asked for: one for each token of the prompt,
            None for the first of them.
        scheduled_s: with the first token: when its sequence was first in a batch, by `time.perf_counter`.
    """

    request_id: str
    index: int  # type: ignore[assignment]  # hides a method of tuples, which nothing calls
    sampled: SampledToken
    finish_reason: FinishReason | None = None
    ends_request: bool = False
    num_cached: int = 0
    prompt_logprobs: tuple[SampledToken | None, ...] | None = None
    scheduled_s: float | None = None


@dataclass(frozen=True)
class Stats:
    """What the engine is doing, and what it has done since it was made.

    Attributes:
        waiting, running: sequences now.
        kv_blocks_used, kv_blocks_total: of the KV cache; used are those that sequences hold.
        prefix_queried_tokens, prefix_hit_tokens: tokens of prompts looked up in the KV cache, and found there.
        preemptions: how often a sequence gave its blocks up, to be computed again.
        prompt_tokens, generated_tokens: tokens of admitted prompts, and tokens that were sampled.
        steps: forwards.
    """

    waiting: int = 0
    running: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
