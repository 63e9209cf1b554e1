"""What becomes of a prompt: its continuations' tokens and texts, collected as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from piecework.engine.engine import TokenOutput
from piecework.engine.request import FinishReason, GenerationRequest
from piecework.engine.sampling.sampler import SampledToken
from piecework.engine.text.deltas import OutputStream, TextDelta
from piecework.engine.text.tokenizer import Tokenizer


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


@final
class CompletionText:
    """The continuations of one request while their tokens come.

    Args:
        request: what was asked.
        tokenizer: the model's; without one, texts are empty.
    """

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer | None) -> None:
        params = request.params
        self._request = request
        self._streams = [
            None if tokenizer is None else OutputStream(tokenizer, params, request.prompt) for _ in range(params.n)
        ]
        self._deltas: list[list[TextDelta]] = [[] for _ in range(params.n)]
        self._first: TokenOutput | None = None

    def add(self, output: TokenOutput) -> TextDelta | None:
        """Take in a token; returns what it adds, or None where its text has ended before."""
        if self._first is None or output.prompt_logprobs is not None:
            self._first = output
        deltas = self._deltas[output.index]
        if deltas and deltas[-1].finish_reason is not None:
            return None  # from the step that ran when a stop string ended the text
        stream = self._streams[output.index]
        if stream is None:
            delta = TextDelta("", (output.sampled,), output.finish_reason)
        else:
            delta = stream.add(output.sampled, output.finish_reason)
        deltas.append(delta)
        return delta

    def ended_by_itself(self, output: TokenOutput) -> bool:
        """Return whether the text of the output's continuation has ended, and the engine doesn't know."""
        return output.finish_reason is None and self._deltas[output.index][-1].finish_reason is not None

    def completion(self) -> Completion:
        """Return what became of the request."""
        assert self._first is not None
        made = tuple(_continuation(deltas, logprobs=self._request.params.logprobs) for deltas in self._deltas)
        return Completion(self._request.prompt, made, self._first.num_cached, self._first.prompt_logprobs)


def _continuation(deltas: Sequence[TextDelta], *, logprobs: int | None) -> Continuation:
    last = deltas[-1]
    assert last.finish_reason is not None
    sampled = tuple(token for delta in deltas for token in delta.tokens)
    return Continuation(
        "".join(delta.text for delta in deltas),
        tuple(token.token for token in sampled),
        last.finish_reason,
        last.stop,
        None if logprobs is None else sampled,
    )
