"""Texts from an engine: prompts and requests in, text deltas out. `LLM` and the server both stand on this."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, cast, final

from piecework.engine.async_engine import AsyncEngine
from piecework.engine.output import Stats, TokenOutput
from piecework.engine.request import GenerationRequest
from piecework.engine.text.chat_template import Message
from piecework.engine.text.completion import Completion, completion_of
from piecework.engine.text.deltas import RequestTexts, TextDelta
from piecework.engine.text.tokenizer import Tokenizer
from piecework.errors import RequestError
from piecework.spec.encoder_config import Task


@final
class TextEngine:
    """Continues prompts as texts. Any thread and any event loop may use it, several at a time.

    Args:
        engine: it runs in a thread of its own.
        tokenizer: the model's; without one, prompts are tokens and texts are empty.
    """

    def __init__(self, engine: AsyncEngine, tokenizer: Tokenizer | None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._token_bytes: list[bytes] | None = None
        self._mutex = threading.Lock()

    @property
    def task(self) -> Task:
        """What it does with texts."""
        return Task.GENERATE

    @property
    def max_positions(self) -> int:
        """The longest sequence, prompt and continuation together, in tokens."""
        return self._engine.max_length

    @property
    def failure(self) -> str:
        """What has ended the engine for good, or ""."""
        error = self._engine.error
        return "" if error is None else f"the engine failed: {type(error).__name__}: {error}"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a plain prompt; raises RequestError where there is no tokenizer."""
        return self._require_tokenizer("continue a text").encode(text, add_special_tokens=add_special_tokens)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the tokens of a conversation, up to where the assistant answers; see `Tokenizer.encode_chat`."""
        return self._require_tokenizer("continue a conversation").encode_chat(messages, tools=tools, extra=extra)

    @property
    def chat_templates(self) -> str:
        """The sources of the model's chat templates, "" where it has none."""
        return "" if self._tokenizer is None else self._tokenizer.chat_templates

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; raises RequestError where there is no tokenizer."""
        return self._require_tokenizer("decode tokens").decode(tokens)

    def token_bytes(self) -> Sequence[bytes]:
        """Return the bytes of each of the tokenizer's tokens; the first time takes part of a second.

        A model may have more tokens than its tokenizer.
        """
        with self._mutex:
            if self._token_bytes is None:
                tokenizer = self._require_tokenizer("the bytes of tokens")
                self._token_bytes = tokenizer.token_bytes(range(tokenizer.num_tokens))
            return self._token_bytes

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError or CapacityError where a request could never run.

        The first request with a grammar has it compiled here, which takes a while.
        """
        if request.params.stop:
            self._require_tokenizer("stop at a string")
        self._engine.check(request)

    async def stream(self, request: GenerationRequest) -> AsyncIterator[TextDelta]:
        """Yield what each step adds, the continuations interleaved.

        Whoever stops iterating, by cancellation or `aclose`, ends the request: its memory is free after one step.

        Raises RequestError or CapacityError where it can't run, EngineError where the engine ends before it does.
        """
        texts = RequestTexts(request, self._tokenizer)
        # the engine's stream is closed here and now, and not when the garbage collector comes by
        async with aclosing(cast("Any", self._engine.stream(request))) as outputs:
            async for output in outputs:
                delta = self._add(output, texts)
                if delta is not None:
                    yield delta
                    if delta.finish_reason is not None and texts.ended:
                        return

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Return what became of requests, in their order; blocks the calling thread meanwhile.

        Raises like `check`, before anything runs, and like `stream`.
        """
        for request in requests:
            self.check(request)
        texts = {request.request_id: RequestTexts(request, self._tokenizer) for request in requests}
        deltas: dict[str, list[TextDelta]] = {request.request_id: [] for request in requests}
        for output in self._engine.run(requests):
            delta = self._add(output, texts[output.request_id])
            if delta is not None:
                deltas[output.request_id].append(delta)
        return [completion_of(request, deltas[request.request_id]) for request in requests]

    def stats(self) -> Stats:
        """Return what the engine is doing. Cheap; any thread may call it."""
        return self._engine.stats()

    def close(self) -> None:
        """End what runs with an EngineError, and let go of the model."""
        self._engine.close()

    def _add(self, output: TokenOutput, texts: RequestTexts) -> TextDelta | None:
        """Return what a token adds, and end its continuation where a stop string did."""
        delta = texts.add(output)
        if delta is not None and delta.finish_reason is not None and output.finish_reason is None:
            self._engine.abort(output.request_id, output.index)
        return delta

    def _require_tokenizer(self, asked: str) -> Tokenizer:
        if self._tokenizer is None:
            raise RequestError(
                asked=asked,
                found="no tokenizer.json in the model directory",
                try_="give tokens, or a model directory with a tokenizer",
            )
        return self._tokenizer
