"""From admitted prompts to an answer, whole or streamed; the same for both kinds of requests."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast, final

from starlette.requests import Request
from starlette.responses import Response

from piecework.errors import PieceworkError
from piecework.server.context import ServerContext
from piecework.server.errors import ApiError, as_api_error
from piecework.server.event_stream import DONE, ClientGone, Emit, EventStream, event, json_bytes, until_disconnect
from piecework.server.service import Delta, Generation, Service, TokenLogprobs

CLIENT_CLOSED_REQUEST: Final = 499  # nginx' number; nobody is there to read it


@dataclass
class Choice:
    """One continuation so far. Changed by `collect` only."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(self.texts)


class AnswerFormat(ABC):
    """How an answer is written: `CompletionFormat` or `ChatFormat`. One object per request."""

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """Return the chunks that a stream begins with."""

    @abstractmethod
    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Return the chunks for what was generated; none where there is nothing to say yet."""

    @abstractmethod
    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the chunk with a stream's usage."""

    @abstractmethod
    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the answer in one piece."""


@final
class Exchange:
    """One request for text: its prompts, and what is measured and counted while they are continued.

    Args:
        context: the server's.
        service: what generates.
        generations: one for each prompt, all with the same number of continuations.
        began_s: when the request came, by `time.perf_counter`.
        hidden_tokens: tokens of each continuation that nobody asked for, not to be counted.
    """

    def __init__(
        self,
        context: ServerContext,
        service: Service,
        generations: Sequence[Generation],
        *,
        began_s: float,
        hidden_tokens: int = 0,
    ) -> None:
        self._context = context
        self._service = service
        self._generations = generations
        self._began_s = began_s
        self._hidden = hidden_tokens
        self._last_s: dict[int, float] = {}
        self._num_generated = 0
        self._num_cached = 0

    @property
    def num_choices(self) -> int:
        """Continuations of all prompts together."""
        return sum(generation.params.n for generation in self._generations)

    async def check(self) -> None:
        """Raise RequestError or CapacityError where one of the prompts could never run."""
        for generation in self._generations:
            await self._service.check(generation)

    async def run(self, on_delta: Callable[[Delta], Awaitable[None]]) -> None:
        """Generate; `on_delta` gets what comes, with the continuations of all prompts numbered through.

        Being cancelled ends all of the generations.
        """
        if len(self._generations) == 1:
            await self._run_one(self._generations[0], first=0, on_delta=on_delta)
        else:
            try:
                async with asyncio.TaskGroup() as group:
                    first = 0
                    for generation in self._generations:
                        group.create_task(self._run_one(generation, first=first, on_delta=on_delta))
                        first += generation.params.n
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        self._context.metrics.request_time.observe(time.perf_counter() - self._began_s)

    async def _run_one(
        self, generation: Generation, *, first: int, on_delta: Callable[[Delta], Awaitable[None]]
    ) -> None:
        # closed at once, and not when the garbage collector comes by: it is what frees the request's blocks
        async with aclosing(cast("Any", self._service.stream(generation))) as deltas:
            async for delta in deltas:
                self._measure(delta, key=first + delta.index)
                if delta.finish_reason == "abort":
                    raise ApiError(503, "the server stopped before the text was finished", code="aborted")
                await on_delta(replace(delta, index=first + delta.index) if first else delta)

    def _measure(self, delta: Delta, *, key: int) -> None:
        metrics = self._context.metrics
        if delta.tokens:
            now = time.perf_counter()
            before = self._last_s.get(key)
            if before is None:
                metrics.first_token.observe(now - self._began_s)
                self._context.status.first_token()
                self._num_cached += delta.num_cached
            else:
                metrics.inter_token.observe((now - before) / len(delta.tokens))
            self._last_s[key] = now
            self._num_generated += len(delta.tokens)
        if delta.finish_reason is not None:
            metrics.finished.labels(delta.finish_reason).inc()

    def usage(self) -> dict[str, Any]:
        """Return the tokens so far, as OpenAI counts them: a prompt counts once, however many continue it."""
        prompt = sum(len(generation.prompt) for generation in self._generations)
        generated = self._num_generated - self._hidden * len(self._last_s)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": min(self._num_cached, prompt)},
        }


async def answer_whole(
    request: Request, exchange: Exchange, answer: AnswerFormat, *, context: ServerContext
) -> Response:
    """Return the answer in one piece; the generation ends when the client goes away."""
    ticket = context.admission.admit()
    choices = [Choice() for _ in range(exchange.num_choices)]

    async def collect(delta: Delta) -> None:
        choice = choices[delta.index]
        choice.texts.append(delta.text)
        choice.logprobs += delta.logprobs
        choice.prompt_logprobs = delta.prompt_logprobs or choice.prompt_logprobs
        choice.finish_reason = delta.finish_reason or choice.finish_reason

    try:
        await exchange.check()
        await until_disconnect(request, exchange.run(collect))
    except ClientGone:
        context.metrics.disconnects.inc()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        ticket.release()
    return Response(json_bytes(answer.whole(choices, exchange.usage())), media_type="application/json")


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
        async def pass_on(delta: Delta) -> None:
            for chunk in answer.chunks(delta):
                await emit(event({**chunk, "usage": None} if include_usage else chunk))

        try:
            for chunk in answer.opening():
                await emit(event({**chunk, "usage": None} if include_usage else chunk))
            await exchange.run(pass_on)
            if include_usage:
                await emit(event(answer.usage_chunk(exchange.usage())))
        except ApiError as error:
            await emit(event(error.to_json()))
        except PieceworkError as error:
            context.log.failure("generation_failed", error)
            await emit(event(as_api_error(error).to_json()))
        except Exception as error:  # noqa: BLE001 - the status is sent already; the client must learn of it all the same
            context.log.failure("generation_failed", error)
            await emit(event(ApiError(500, "the server failed while generating").to_json()))
        await emit(DONE)

    def on_end(gone: bool) -> None:  # noqa: FBT001
        ticket.release()
        if gone:
            context.metrics.disconnects.inc()

    return EventStream(produce, on_end=on_end)
