"""From a sequence's sampled tokens to its text, as far as it is certain, with stop strings cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from piecework.engine.request import FinishReason
from piecework.engine.sampling.sampler import SampledToken
from piecework.engine.sampling_params import SamplingParams
from piecework.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextDelta:
    """What one step adds to a sequence.

    Attributes:
        text: what is certain by now; text that may be the start of a stop string comes later or never.
        tokens: the step's tokens, with their logprobs where asked for. Those whose text is cut off are among them.
        finish_reason: set on the last one.
        stop: the stop string or the token that ended the sequence.
    """

    text: str
    tokens: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    stop: str | int | None = None


@final
class OutputStream:
    """The text of one sequence: add its tokens one by one, until a delta has a finish reason.

    A stop string counts where it is first complete; where several are complete at the same character, the longest. It
    is no part of the text, nor is the text of a token that ended the sequence. The first `min_tokens` tokens complete
    no stop string. Bytes at the end that are no whole character are left out.

    Args:
        tokenizer: the model's.
        params: the request's.
        prompt: the tokens that the sequence continues.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        self._detokenizer = tokenizer.stream(prompt)
        self._stop = tuple(params.stop)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._held = ""

    def add(self, token: SampledToken, finish_reason: FinishReason | None = None) -> TextDelta:
        """Return what a token adds.

        Args:
            token: the sampled one.
            finish_reason: the engine's, where it is the sequence's last. A stop string in the token's text makes STOP
                of it, also where the engine gave none: the rest of the sequence is then not wanted.
        """
        self._num_tokens += 1
        stopped = finish_reason is FinishReason.STOP
        text = "" if stopped else self._detokenizer.add(token.token)
        if finish_reason is not None:
            text += self._detokenizer.finish()
        stop: str | int | None = token.token if stopped else None
        if self._stop and (text or self._held):
            text, found = self._pass_on(text, is_last=finish_reason is not None)
            if found is not None:
                finish_reason, stop = FinishReason.STOP, found
        return TextDelta(text, (token,), finish_reason, stop)

    def finish(self, finish_reason: FinishReason) -> TextDelta:
        """Return what is left where the sequence ends without a token, as on abort."""
        text = self._detokenizer.finish()
        if self._stop:
            text, _ = self._pass_on(text, is_last=True)
        return TextDelta(text, (), finish_reason)

    def _pass_on(self, text: str, *, is_last: bool) -> tuple[str, str | None]:
        """Return what is certain of the held and the new text, and the stop string that ends it."""
        whole = self._held + text
        unchecked = len(whole) if self._num_tokens <= self._min_tokens else len(self._held)
        found = _first_stop(whole, self._stop, after=unchecked)
        if found is not None:
            self._held = ""
            return whole[: found.start], found.stop
        certain = len(whole) if is_last else _num_certain(whole, self._stop)
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


def _num_certain(text: str, stops: Sequence[str]) -> int:
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
