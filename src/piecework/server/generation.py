"""From admitted prompts to an answer, whole or streamed; the same for both kinds of requests."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Final, cast, final

from starlette.requests import Request
from starlette.responses import Response

from piecework.engine.output import SampledToken
from piecework.engine.request import GenerationRequest
from piecework.engine.text.completion import Completion, completion_of
from piecework.engine.text.deltas import TextDelta
from piecework.errors import PieceworkError
from piecework.server.context import ServerContext
from piecework.server.errors import ApiError, as_api_error
from piecework.server.event_stream import DONE, ClientGone, Emit, EventStream, event, until_disconnect
from piecework.server.responses import Answered, PromptLogprob, PromptTokensDetails, Usage
from piecework.server.service import Service

CLIENT_CLOSED_REQUEST: Final = 499  # nginx' number; nobody is there to read it


class AnswerFormat(ABC):
    """How an answer is written: `CompletionFormat` or `ChatFormat`. One object per request.

    Continuations of all prompts are numbered through: those of prompt 0 come first.
    """

    @abstractmethod
    def opening(self) -> Sequence[Answered]:
        """Return the chunks that a stream begins with."""

    @abstractmethod
    def chunks(self, prompt: int, delta: TextDelta) -> Sequence[Answered]:
        """Return the chunks for what a prompt's continuation grew by; none where there is nothing to say yet."""

    @abstractmethod
    def usage_chunk(self, usage: Usage) -> Answered:
        """Return the chunk with a stream's usage."""

    @abstractmethod
    def whole(self, completions: Sequence[Completion], usage: Usage) -> Answered:
        """Return the answer in one piece, of what became of each prompt."""


OnDelta = Callable[[int, TextDelta], Awaitable[None]]
"""Is given which of the prompts, and what one of its continuations grew by."""


@final
class Exchange:
    """One request for text: its prompts, and what is measured and counted while they are continued.

    Args:
        context: the server's.
        service: what generates.
        requests: one for each prompt, all with the same number of continuations.
        began_s: when the request came, by `time.perf_counter`.
        hidden_tokens: tokens of each continuation that nobody asked for, not to be counted.
    """

    def __init__(
        self,
        context: ServerContext,
        service: Service,
        requests: Sequence[GenerationRequest],
        *,
        began_s: float,
        hidden_tokens: int = 0,
    ) -> None:
        self._context = context
        self._service = service
        self.requests = [context.seeded(request) for request in requests]
        self._began_s = began_s
        self._hidden = hidden_tokens
        self._first_s: dict[tuple[int, int], float] = {}
        self._last_s: dict[tuple[int, int], float] = {}
        self._num_of: Counter[tuple[int, int]] = Counter()
        self._num_cached = 0

    async def check(self) -> None:
        """Raise RequestError or CapacityError where one of the prompts could never run."""
        for request in self.requests:
            if request.params.structured is None:
                self._service.check(request)
            else:  # a new grammar is compiled, which takes a while
                await asyncio.to_thread(self._service.check, request)

    async def run(self, on_delta: OnDelta) -> None:
        """Generate; `on_delta` gets what comes. Being cancelled ends all of it."""
        if len(self.requests) == 1:
            await self._run_one(0, on_delta)
        else:
            try:
                async with asyncio.TaskGroup() as group:
                    for prompt in range(len(self.requests)):
                        group.create_task(self._run_one(prompt, on_delta))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        self._context.metrics.request_time.observe(time.perf_counter() - self._began_s)

    async def _run_one(self, prompt: int, on_delta: OnDelta) -> None:
        # closed at once, and not when the garbage collector comes by: it is what frees the request's blocks
        async with aclosing(cast("Any", self._service.stream(self.requests[prompt]))) as deltas:
            async for delta in deltas:
                self._measure(delta, key=(prompt, delta.index))
                await on_delta(prompt, delta)

    def _measure(self, delta: TextDelta, *, key: tuple[int, int]) -> None:
        now = time.perf_counter()
        if delta.tokens:
            before = self._last_s.get(key)
            if before is None:
                self._measure_first(delta, key=key, now_s=now)
            else:
                self._context.metrics.inter_token.observe((now - before) / len(delta.tokens))
            self._last_s[key] = now
            self._num_of[key] += len(delta.tokens)
        if delta.finish_reason is not None:
            self._context.metrics.ends(
                delta.finish_reason, decode_s=now - self._first_s.get(key, now), num_tokens=self._num_of[key]
            )

    def _measure_first(self, delta: TextDelta, *, key: tuple[int, int], now_s: float) -> None:
        metrics = self._context.metrics
        metrics.first_token.observe(now_s - self._began_s)
        if delta.scheduled_s is not None:
            metrics.queue_time.observe(max(0.0, delta.scheduled_s - self._began_s))
            metrics.prefill_time.observe(max(0.0, now_s - delta.scheduled_s))
        metrics.request_prompt.observe(len(self.requests[key[0]].prompt))
        self._context.status.first_token()
        self._num_cached += delta.num_cached
        self._first_s[key] = now_s

    def usage(self) -> Usage:
        """Return the tokens so far, as OpenAI counts them: a prompt counts once, however many continue it."""
        prompt = sum(len(request.prompt) for request in self.requests)
        generated = self._num_of.total() - self._hidden * len(self._last_s)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=generated,
            total_tokens=prompt + generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=min(self._num_cached, prompt)),
        )


async def answer_whole(
    request: Request, exchange: Exchange, answer: AnswerFormat, *, context: ServerContext
) -> Response:
    """Return the answer in one piece; the generation ends when the client goes away."""
    ticket = context.admission.admit()
    deltas: list[list[TextDelta]] = [[] for _ in exchange.requests]

    async def collect(prompt: int, delta: TextDelta) -> None:
        deltas[prompt].append(delta)

    try:
        await exchange.check()
        await until_disconnect(request, exchange.run(collect))
    except ClientGone:
        context.metrics.disconnects.inc()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        ticket.release()
    completions = [completion_of(request, of_it) for request, of_it in zip(exchange.requests, deltas, strict=True)]
    return answer.whole(completions, exchange.usage()).to_response()


async def answer_stream(
    exchange: Exchange, answer: AnswerFormat, *, include_usage: bool, context: ServerContext
) -> Response:
    """Return a stream of events. What goes wrong in the middle becomes an event with OpenAI's error object."""
    ticket = context.admission.admit()
    try:
        await exchange.check()
    except BaseException:
        ticket.release()
        raise

    async def produce(emit: Emit) -> None:
        async def pass_on(prompt: int, delta: TextDelta) -> None:
            for chunk in answer.chunks(prompt, delta):
                await emit(event(chunk))

        try:
            for chunk in answer.opening():
                await emit(event(chunk))
            await exchange.run(pass_on)
            if include_usage:
                await emit(event(answer.usage_chunk(exchange.usage())))
        except ApiError as error:
            await emit(event(error.answer()))
        except PieceworkError as error:
            context.log.failure("generation_failed", error)
            await emit(event(as_api_error(error).answer()))
        except Exception as error:  # noqa: BLE001 - the status is sent already; the client must learn of it all the same
            context.log.failure("generation_failed", error)
            await emit(event(ApiError(500, "the server failed while generating").answer()))
        await emit(DONE)

    def on_end(gone: bool) -> None:  # noqa: FBT001
        ticket.release()
        if gone:
            context.metrics.disconnects.inc()

    return EventStream(produce, on_end=on_end)


@final
class TokenTexts:
    """How tokens are written: `token_bytes` has the bytes of each; a token that the tokenizer lacks has none."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes

    def bytes_of(self, token: int) -> bytes:
        """Return a token's bytes."""
        return self._token_bytes[token] if token < len(self._token_bytes) else b""

    def text_of(self, token: int) -> str:
        """Return a token as people read it; incomplete characters are U+FFFD."""
        return self.bytes_of(token).decode(errors="replace")


async def token_texts(service: Service) -> TokenTexts:
    """Return how a service's tokens are written; the first time takes a while, beside the event loop."""
    return TokenTexts(await asyncio.to_thread(service.token_bytes))


def prompt_logprobs_of(
    scores: Sequence[SampledToken | None] | None, *, known: TokenTexts
) -> list[dict[str, PromptLogprob] | None]:
    """Return the log-probabilities of a prompt's tokens as vLLM writes them: by token id, the prompt's own first."""
    return [None if entry is None else _by_id(entry, known=known) for entry in scores or ()]


def _by_id(entry: SampledToken, *, known: TokenTexts) -> dict[str, PromptLogprob]:
    ranks = {token: rank for rank, (token, _) in enumerate(entry.top, start=1)}
    every = dict([(entry.token, logprob_of(entry)), *entry.top])
    return {
        str(token): PromptLogprob(logprob=logprob, rank=ranks.get(token), decoded_token=known.text_of(token))
        for token, logprob in every.items()
    }


def logprob_of(entry: SampledToken) -> float:
    """Return a token's log-probability, where log-probabilities were asked for."""
    assert entry.logprob is not None, "nobody asked for log-probabilities"
    return entry.logprob
