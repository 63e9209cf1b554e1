"""What the HTTP layer needs of whatever generates text: a small interface, so that a test can stand in for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from piecework.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Generation:
    """One prompt and how to continue it.

    Args:
        request_id: unique while the server runs.
        prompt: token ids, at least one.
        params: how to continue; `params.n` continuations.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Candidate:
    """A token that was or could have been chosen.

    Args:
        token: its id.
        text: as people read it; incomplete characters are U+FFFD.
        raw: its bytes.
        logprob: natural logarithm of its probability.
    """

    token: int
    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """The token at one place, and the likeliest ones there, best first."""

    chosen: Candidate
    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Delta:
    """What one step adds to one continuation.

    Args:
        index: of the continuation, 0 to n - 1.
        text: what became complete; may be empty.
        tokens: the ids that were generated.
        logprobs: one for each token where they were asked for, else empty.
        finish_reason: "stop", "length" or "abort" with the last one, else None.
        num_cached: tokens of the prompt that were in the prefix cache; said with the first.
        prompt_logprobs: with the first of continuation 0, where asked for: one for each prompt token, None for the
            first of them.
    """

    index: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    num_cached: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(frozen=True)
class Stats:
    """What the engine is doing, and what it has done since it started.

    Args:
        waiting, running: sequences now.
        kv_blocks_used, kv_blocks_total: of the KV cache.
        prefix_queried_tokens, prefix_hit_tokens: looked up in the prefix cache, and found there.
        preemptions: sequences that gave their blocks up and were computed again.
        prompt_tokens, generated_tokens: processed.
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


class Service(ABC):
    """Generates text. Implementations: `EngineService`, and a deterministic one in the tests."""

    @property
    @abstractmethod
    def max_positions(self) -> int:
        """The longest sequence, prompt and continuation together, in tokens."""

    @property
    @abstractmethod
    def failure(self) -> str:
        """What has ended the engine for good, or ""."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the tokens of a plain prompt. May be called from any thread."""

    @abstractmethod
    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        template_arguments: Mapping[str, Any],
    ) -> list[int]:
        """Return the tokens of a conversation, up to where the assistant answers. May be called from any thread.

        Raises RequestError where the model has no chat template or it refuses the messages.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""

    @abstractmethod
    async def check(self, generation: Generation) -> None:
        """Raise RequestError or CapacityError where this could never run, before any of it does."""

    @abstractmethod
    def stream(self, generation: Generation) -> AsyncIterator[Delta]:
        """Yield what is generated, the continuations interleaved.

        Whoever stops iterating, by cancellation or `aclose`, ends the request: its memory is free after one step.
        """

    @abstractmethod
    def stats(self) -> Stats:
        """Return what the engine is doing. Cheap; may be called from any thread."""
