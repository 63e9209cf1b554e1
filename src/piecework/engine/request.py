"""What a generation request asks for, and what the engine knows of it while it runs. Works without torch."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum

from piecework.errors import RequestError


class FinishReason(Enum):
    """Why a sequence ended: at a stop token, or at its most tokens."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    Args:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: 0 takes the likeliest token; more flattens the distribution.
        top_k: sample from the k likeliest tokens; 0 means all.
        top_p: sample from the likeliest tokens that together reach this probability; 1 means all.
        seed: of this request's own random numbers; None takes a fresh one.
        stop_token_ids: tokens that end the sequence, besides the model's own.
        ignore_eos: generate on after the model's own end tokens.

    Raises RequestError for a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, f"max_new_tokens {self.max_new_tokens}", "at least 1")
        _require(0.0 <= self.temperature < float("inf"), f"temperature {self.temperature}", "a number of at least 0")
        _require(self.top_k >= 0, f"top_k {self.top_k}", "at least 0, where 0 means all tokens")
        _require(0.0 < self.top_p <= 1.0, f"top_p {self.top_p}", "more than 0 and at most 1")
        in_range = self.seed is None or -(2**63) <= self.seed < 2**63
        _require(in_range, f"seed {self.seed}", "an integer of 64 bits")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and how to continue it.

    Args:
        request_id: unique among the requests of an engine.
        prompt: token ids, at least one.
        params: how to continue.
    """

    request_id: int
    prompt: tuple[int, ...]
    params: SamplingParams

    def __post_init__(self) -> None:
        _require(bool(self.prompt), "a prompt without tokens", "at least one token, such as the model's BOS token")


@dataclass(eq=False)
class Sequence:
    """A request on its way: changed by scheduler and generator only.

    Attributes:
        request: what was asked.
        max_length: most tokens of prompt and continuation together.
        tokens: prompt and continuation so far.
        num_computed: how many of them are in the KV cache.
        blocks: the KV cache's blocks that belong to it.
        finish_reason: set when it ended.
    """

    request: GenerationRequest
    max_length: int
    tokens: list[int] = field(init=False)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def num_uncomputed(self) -> int:
        """Tokens that are not in the KV cache yet."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether the whole prompt is in the KV cache, so that each step adds one token."""
        return self.num_computed >= len(self.request.prompt)

    def append(self, token: int, *, stop_token_ids: Items[int]) -> None:
        """Add a generated token, and set the finish reason if it is the last."""
        self.tokens.append(token)
        if token in stop_token_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.tokens) >= self.max_length:
            self.finish_reason = FinishReason.LENGTH


def _require(holds: bool, found: str, wanted: str) -> None:  # noqa: FBT001
    if not holds:
        raise RequestError(asked="generate text", found=found, try_=wanted)
