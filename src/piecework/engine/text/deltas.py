"""From the tokens that the engine emits to texts, as far as they are certain, with stop strings cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from piecework.engine.output import SampledToken, TokenOutput
from piecework.engine.request import FinishReason, GenerationRequest
from piecework.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from piecework.engine.text.tokenizer import Tokenizer  # costs an import that who only needs deltas does without


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one step adds to one continuation: what `LLM.stream` yields, and what the server writes to its clients.

    Attributes:
        text: what is certain by now; text that may be the start of a stop string comes later or never.
        tokens: the step's tokens, with their logprobs where asked for. Those whose text is cut off are among them.
        finish_reason: set on the last one.
        stop: the stop string or the token that ended the continuation.
        index: of the continuation, 0 to n - 1.
        num_cached: how many of the prompt's tokens were found in the KV cache; said with the first token.
        prompt_logprobs: with the first token of continuation 0 where asked for: one for each token of the prompt,
            None for the first of them.
        scheduled_s: with the first token: when its sequence was first in a batch, by `time.perf_counter`.
    """

    text: str
    tokens: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    index: int = 0
    num_cached: int = 0
    prompt_logprobs: tuple[SampledToken | None, ...] | None = None
    scheduled_s: float | None = None


@final
class RequestTexts:
    """The texts of one request's continuations while their tokens come.

    Args:
        request: what was asked.
        tokenizer: the model's; without one, texts are empty.
    """

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer | None) -> None:
        params, prompt = request.params, request.prompt
        self._streams = [OutputStream(tokenizer, params, prompt) for _ in range(params.n)]

    @property
    def ended(self) -> bool:
        """Whether all texts have ended."""
        return all(stream.ended for stream in self._streams)

    def add(self, output: TokenOutput) -> TextDelta | None:
        """Take in a token; returns what it adds, or None where its text has ended before.

        The engine doesn't know of stop strings, and may be a step ahead of the reader who finds one.
        """
        stream = self._streams[output.index]
        return None if stream.ended else stream.add(output)


@final
class OutputStream:
    """The text of one sequence: add its tokens one by one, until it has `ended`.

    A stop string counts where it is first complete; where several are complete at the same character, the longest. It
    is no part of the text, nor is the text of a token that ended the sequence. The first `min_tokens` tokens complete
    no stop string. Bytes at the end that are no whole character are left out.

    Args:
        tokenizer: the model's; without one, the text is empty.
        params: the request's.
        prompt: the tokens that the sequence continues.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        self._detokenizer = (
            None if tokenizer is None else tokenizer.stream(prompt, skip_special=params.skip_special_tokens)
        )
        self._stop = tuple(params.stop)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._held = ""
        self.ended = False

    def add(self, output: TokenOutput) -> TextDelta:
        """Return what a token adds.

        A stop string in its text makes STOP the reason to end, whatever the engine's: the rest of the sequence is then
        not wanted.
        """
        self._num_tokens += 1
        token, finish_reason = output.sampled, output.finish_reason
        stopped = finish_reason is FinishReason.STOP
        text = self._decode(token.token, stopped=stopped, is_last=finish_reason is not None)
        stop: str | int | None = token.token if stopped else None
        if self._stop and (text or self._held):
            text, found = self._pass_on(text, is_last=finish_reason is not None)
            if found is not None:
                finish_reason, stop = FinishReason.STOP, found
        self.ended = finish_reason is not None
        known = (output.num_cached, output.prompt_logprobs, output.scheduled_s)
        return TextDelta(text, (token,), finish_reason, stop, output.index, *known)

    def _decode(self, token: int, *, stopped: bool, is_last: bool) -> str:
        if self._detokenizer is None:
            return ""
        text = "" if stopped else self._detokenizer.add(token)
        return text + self._detokenizer.finish() if is_last else text

    def _pass_on(self, text: str, *, is_last: bool) -> tuple[str, str | None]:
        """Return what is certain of the held and the new text, and the stop string that ends it."""
        whole = self._held + text
        unchecked = len(whole) if self._num_tokens <= self._min_tokens else len(self._held)
        found = _first_stop(whole, self._stop, after=unchecked)
        if found is not None:
            self._held = ""
            return whole[: found.start], found.stop
        certain = len(whole) if is_last else num_certain(whole, self._stop)
        self._held = whole[certain:]
        return whole[:certain], None


@dataclass(frozen=True)
class _Found:
    stop: str
    start: int


def _first_stop(text: str, stops: Sequence[str], *, after: int) -> _Found | None:
    """Return the stop string that is complete first, later than character `after`; of equal ones the longest."""
    best: tuple[int, int] | None = None
    chosen = ""
    for stop in stops:
        start = text.find(stop, max(0, after + 1 - len(stop)))
        place = (start + len(stop), start)
        if start >= 0 and (best is None or place < best):
            best, chosen = place, stop
    return None if best is None else _Found(chosen, best[1])


def num_certain(text: str, stops: Sequence[str]) -> int:
    """Return how many characters can't be part of a stop string that is still to be completed."""
    certain = len(text)
    for stop in stops:
        start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while 0 <= start < certain:
            if stop.startswith(text[start:]):
                certain = start
                break
            start = text.find(stop[0], start + 1)
    return certain
