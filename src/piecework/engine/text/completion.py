"""What became of a prompt: its continuations' tokens and texts, as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from piecework.engine.output import SampledToken
from piecework.engine.request import FinishReason, GenerationRequest
from piecework.engine.text.deltas import TextDelta


@dataclass(frozen=True)
class Continuation:
    """One text that continues a prompt.

    Attributes:
        text: without the stop string or end token that ended it.
        tokens: all generated tokens, those whose text was cut off among them.
        finish_reason: why it ended.
        stop: the stop string or token that ended it.
        logprobs: one for each token, where asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stop: str | int | None = None
    logprobs: tuple[SampledToken, ...] | None = None


@dataclass(frozen=True)
class Completion:
    """What became of a prompt.

    Attributes:
        prompt: its tokens.
        continuations: `n` of them.
        num_cached: tokens of the prompt that were found in the KV cache.
        prompt_logprobs: one for each token of the prompt, None for the first, where asked for.
    """

    prompt: tuple[int, ...]
    continuations: tuple[Continuation, ...]
    num_cached: int = 0
    prompt_logprobs: tuple[SampledToken | None, ...] | None = None

    @property
    def text(self) -> str:
        """The first continuation's text."""
        return self.continuations[0].text

    @property
    def tokens(self) -> tuple[int, ...]:
        """The first continuation's tokens."""
        return self.continuations[0].tokens

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first continuation ended."""
        return self.continuations[0].finish_reason


def completion_of(request: GenerationRequest, deltas: Iterable[TextDelta]) -> Completion:
    """Return what became of a request, of all that its stream has yielded."""
    params = request.params
    of_index: list[list[TextDelta]] = [[] for _ in range(params.n)]
    num_cached, prompt_logprobs = 0, None
    for delta in deltas:
        of_index[delta.index].append(delta)
        num_cached = max(num_cached, delta.num_cached)
        prompt_logprobs = delta.prompt_logprobs or prompt_logprobs
    made = tuple(_continuation(own, with_logprobs=params.logprobs is not None) for own in of_index)
    return Completion(request.prompt, made, num_cached, prompt_logprobs)


def _continuation(deltas: Sequence[TextDelta], *, with_logprobs: bool) -> Continuation:
    last = deltas[-1]
    assert last.finish_reason is not None
    sampled = tuple(token for delta in deltas for token in delta.tokens)
    return Continuation(
        "".join([delta.text for delta in deltas]),
        tuple(token.token for token in sampled),
        last.finish_reason,
        last.stop,
        sampled if with_logprobs else None,
    )
