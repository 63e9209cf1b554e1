"""The engine as a service: tokens to text, with stop strings and log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import fields
from typing import Any, Protocol, cast, final

from piecework.engine.engine import EngineStats, TokenOutput
from piecework.engine.request import GenerationRequest
from piecework.engine.sampling.sampler import SampledToken
from piecework.engine.text.deltas import OutputStream
from piecework.engine.text.tokenizer import Tokenizer
from piecework.server.service import Candidate, Delta, Generation, Service, Stats, TokenLogprobs


class RunningEngine(Protocol):
    """What is needed of an `AsyncEngine`."""

    @property
    def error(self) -> BaseException | None:
        """What ended the engine, if something did."""

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError or CapacityError where a request could never run."""

    def stream(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """Yield a request's tokens; whoever stops iterating ends the request."""

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its continuations."""

    def stats(self) -> EngineStats:
        """Return what the engine is doing."""


@final
class EngineService(Service):
    """Generates text with an engine.

    Args:
        engine: it runs in a thread of its own.
        tokenizer: the model's.
        max_positions: the longest sequence that the model and its KV cache take, in tokens.
    """

    def __init__(self, engine: RunningEngine, tokenizer: Tokenizer, *, max_positions: int) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._max_positions = max_positions
        self._token_bytes: list[bytes] | None = None

    @property
    def max_positions(self) -> int:
        """See `Service.max_positions`."""
        return self._max_positions

    @property
    def failure(self) -> str:
        """See `Service.failure`."""
        error = self._engine.error
        return "" if error is None else f"the engine failed: {type(error).__name__}: {error}"

    def encode(self, text: str) -> list[int]:
        """See `Service.encode`."""
        return self._tokenizer.encode(text)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        template_arguments: Mapping[str, Any],
    ) -> list[int]:
        """See `Service.encode_chat`."""
        return self._tokenizer.encode_chat(messages, tools=tools, extra=template_arguments)

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Service.decode`."""
        return self._tokenizer.decode(tokens)

    async def check(self, generation: Generation) -> None:
        """See `Service.check`. A new grammar is compiled beside the event loop, and long prompts are looked through."""
        request = _request(generation)
        if generation.params.structured is None:
            self._engine.check(request)
        else:
            await asyncio.to_thread(self._engine.check, request)

    async def stream(self, generation: Generation) -> AsyncIterator[Delta]:
        """See `Service.stream`."""
        params = generation.params
        if params.logprobs is not None or params.prompt_logprobs is not None:
            await self._know_token_bytes()
        texts = [OutputStream(self._tokenizer, params, generation.prompt) for _ in range(params.n)]
        open_ = set(range(params.n))
        # the engine's stream is closed here and now, and not when the garbage collector comes by
        async with aclosing(cast("Any", self._engine.stream(_request(generation)))) as outputs:
            async for output in outputs:
                if output.index not in open_:
                    continue  # a step that ran while a stop string ended the text
                delta = self._delta(output, texts[output.index], with_logprobs=params.logprobs is not None)
                if delta.finish_reason is not None:
                    open_.discard(output.index)
                    if output.finish_reason is None:
                        self._engine.abort(generation.request_id, output.index)
                yield delta
                if not open_:
                    return

    def stats(self) -> Stats:
        """See `Service.stats`."""
        stats = self._engine.stats()
        return Stats(**{field.name: getattr(stats, field.name) for field in fields(Stats)})

    def _delta(self, output: TokenOutput, text: OutputStream, *, with_logprobs: bool) -> Delta:
        added = text.add(output.sampled, output.finish_reason)
        scores = output.prompt_logprobs
        return Delta(
            output.index,
            added.text,
            tokens=(output.sampled.token,),
            logprobs=(self._logprobs(output.sampled),) if with_logprobs else (),
            finish_reason=None if added.finish_reason is None else added.finish_reason.value,
            num_cached=output.num_cached,
            prompt_logprobs=None if scores is None else tuple(None if s is None else self._logprobs(s) for s in scores),
        )

    def _logprobs(self, sampled: SampledToken) -> TokenLogprobs:
        assert sampled.logprob is not None
        chosen = self._candidate(sampled.token, sampled.logprob)
        return TokenLogprobs(chosen, tuple(self._candidate(token, logprob) for token, logprob in sampled.top))

    def _candidate(self, token: int, logprob: float) -> Candidate:
        known = self._token_bytes
        assert known is not None
        raw = known[token] if token < len(known) else b""  # a model's vocabulary may be padded
        return Candidate(token, raw.decode(errors="replace"), raw, logprob)

    async def _know_token_bytes(self) -> None:
        """Make the table of all tokens' bytes, once: it takes part of a second for a large vocabulary."""
        if self._token_bytes is None:
            tokens = range(self._tokenizer.num_tokens)
            self._token_bytes = await asyncio.to_thread(self._tokenizer.token_bytes, tokens)


def _request(generation: Generation) -> GenerationRequest:
    return GenerationRequest(generation.request_id, generation.prompt, generation.params)
