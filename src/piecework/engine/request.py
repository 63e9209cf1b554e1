"""What a generation request asks for, and what the engine knows of it while it runs. Works without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from piecework.engine.sampling_params import SamplingParams
from piecework.errors import RequestError

SequenceKey = tuple[str, int]


class FinishReason(Enum):
    """Why a sequence ended: at a stop token or stop string, or at its most tokens."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and how to continue it, `params.n` times: the one value that goes from a caller to the scheduler.

    Args:
        request_id: unique among the requests of an engine.
        prompt: token ids, at least one.
        params: how to continue.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError(
                asked="generate text",
                found="a prompt without tokens",
                try_="at least one token, such as the model's BOS token",
            )


@dataclass(eq=False, slots=True)
class Sequence:
    """One continuation of a request on its way; changed by scheduler and engine only.

    Its key and value states are in the KV cache for the first `num_computed` tokens. One that is preempted gives its
    blocks back and keeps its tokens, so that all of them are to be computed again.

    Attributes:
        request: what was asked.
        index: which of the request's continuations.
        max_length: most tokens of prompt and continuation together.
        end_tokens: generated tokens that end it.
        tokens: prompt and continuation so far.
        generated: the continuation so far; the very list that the sampler sees.
        num_computed: how many tokens are in the KV cache.
        num_scored: how many of the prompt's first tokens have given the logits that the request wants of a prompt.
        num_cached: how many of the prompt's tokens were found in the KV cache when it was first admitted.
        scheduled_s: when it was first admitted, by `time.perf_counter`; None before.
        blocks: the KV cache's blocks that it holds.
        digests: those of its first full blocks, as far as they were needed.
        finish_reason: set when it ended.
    """

    request: GenerationRequest
    index: int
    max_length: int
    end_tokens: frozenset[int] = frozenset()
    key: SequenceKey = field(init=False)
    tokens: list[int] = field(init=False)
    generated: list[int] = field(init=False, default_factory=list)
    num_prompt: int = field(init=False)
    num_computed: int = field(init=False, default=0)
    num_scored: int = field(init=False, default=0)
    num_cached: int = field(init=False, default=-1)
    scheduled_s: float | None = field(init=False, default=None)
    blocks: list[int] = field(init=False, default_factory=list)
    digests: list[bytes] = field(init=False, default_factory=list)
    finish_reason: FinishReason | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.key = (self.request.request_id, self.index)
        self.tokens = list(self.request.prompt)
        self.num_prompt = len(self.tokens)

    @property
    def num_uncomputed(self) -> int:
        """Tokens that are not in the KV cache yet; exactly one while it decodes."""
        return len(self.tokens) - self.num_computed

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether logits of the prompt's own tokens are wanted, which those of a cached prefix can't give."""
        return self.index == 0 and self.request.params.prompt_logprobs is not None

    def append(self, token: int) -> None:
        """Add a generated token, and set the finish reason if it is the last."""
        self.tokens.append(token)
        self.generated.append(token)
        if token in self.end_tokens:
            self.finish_reason = FinishReason.STOP
        elif len(self.tokens) >= self.max_length:
            self.finish_reason = FinishReason.LENGTH
