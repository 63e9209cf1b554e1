"""Send requests to an OpenAI-compatible server as they are due, and note what becomes of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, final

import httpx

from piecework.bench.serving.answers import AnswerError, StreamedAnswer, error_message
from piecework.bench.serving.figures import Outcome
from piecework.errors import PieceworkError

_CONNECT_S: Final = 10.0


class Endpoint(Enum):
    """Which of the server's paths is asked."""

    COMPLETIONS = "completions"
    CHAT = "chat"


@dataclass(frozen=True)
class PlannedRequest:
    """A request that is due `at_s` seconds after the first: a prompt, as text or tokens, and the lengths."""

    at_s: float
    prompt: str | list[int]
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Target:
    """A server, and how it is asked.

    Args:
        base_url: with the "/v1" that other paths follow.
        model: its name there.
        endpoint: which path.
        ignore_eos: whether continuations shall have exactly the length asked for, which not every server understands.
        timeout_s: most seconds for a request.
    """

    base_url: str
    model: str
    endpoint: Endpoint = Endpoint.COMPLETIONS
    ignore_eos: bool = True
    timeout_s: float = 600.0

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.base_url + ("/chat/completions" if self.endpoint is Endpoint.CHAT else "/completions")

    def body(self, request: PlannedRequest) -> dict[str, Any]:
        """Return a request's body: greedy, streaming, with the server's own count of tokens at the end."""
        made: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.output_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint is Endpoint.CHAT:
            made["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            made["prompt"] = request.prompt
        return made | ({"ignore_eos": True} if self.ignore_eos else {})


def base_url(url: str) -> str:
    """Return a server's URL with the "/v1" that OpenAI's paths begin with, whether it was given or not."""
    bare = url.rstrip("/")
    if "://" not in bare:
        bare = f"http://{bare}"
    return bare if bare.endswith("/v1") else f"{bare}/v1"


@final
class ServerClient:
    """Talks to one server; to be entered with `async with`."""

    def __init__(self, *, api_key: str | None) -> None:
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        self._http = httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout)

    async def __aenter__(self) -> ServerClient:
        """Return itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def first_model(self, base: str) -> str:
        """Return the name of the first model of /v1/models. Raises PieceworkError where the server doesn't say."""
        asked = f"the models of {base}"
        try:
            answer = await self._http.get(f"{base}/models", timeout=_CONNECT_S)
            if answer.status_code != httpx.codes.OK:
                raise AnswerError(f"HTTP {answer.status_code}: {_told(answer)}")
            return str(answer.json()["data"][0]["id"])
        except (httpx.HTTPError, httpx.InvalidURL, AnswerError) as error:
            found = str(error) if isinstance(error, AnswerError) else _network_error(error)
            raise PieceworkError(asked=asked, found=found, try_="check the URL and --api-key") from error
        except (ValueError, LookupError, TypeError) as error:
            raise PieceworkError(asked=asked, found="an answer that lists none", try_="name it with --model") from error

    async def send(self, target: Target, request: PlannedRequest, *, begun: float) -> Outcome:
        """Send a request, and read its answer to the end; whatever goes wrong is in the outcome.

        Args:
            target: where to.
            request: what.
            begun: the clock (`time.perf_counter`) at the run's start.
        """
        answer, error = StreamedAnswer(), ""
        sent = time.perf_counter()
        try:
            async with asyncio.timeout(target.timeout_s):
                await self._stream(target, request, answer, sent=sent)
        except TimeoutError:
            error = f"no end after {target.timeout_s:g} s"
        except AnswerError as reason:
            error = str(reason)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as reason:
            error = _network_error(reason)
        return Outcome(
            begin_s=sent - begun,
            latency_s=time.perf_counter() - sent,
            token_s=tuple(answer.token_s),
            input_tokens=request.input_tokens if answer.input_tokens is None else answer.input_tokens,
            output_tokens=len(answer.token_s) if answer.output_tokens is None else answer.output_tokens,
            error=error,
        )

    async def _stream(self, target: Target, request: PlannedRequest, answer: StreamedAnswer, *, sent: float) -> None:
        async with self._http.stream("POST", target.url, json=target.body(request)) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                raise AnswerError(f"HTTP {response.status_code}: {_told(response)}")
            kind = response.headers.get("content-type", "nothing")
            if not kind.startswith("text/event-stream"):
                raise AnswerError(f"no stream of events but {kind}")
            async for data in response.aiter_bytes():
                answer.feed(data, seconds=time.perf_counter() - sent)
        answer.end()


async def send_all(
    client: ServerClient,
    target: Target,
    requests: Sequence[PlannedRequest],
    *,
    concurrency: int | None,
    on_end: Callable[[Outcome], None],
) -> list[Outcome]:
    """Send requests when they are due, and return their outcomes in the same order.

    Args:
        client: to send them with.
        target: where to.
        requests: in the order of their times.
        concurrency: at most so many at a time; those that have to wait are sent late. None: any number.
        on_end: is told of every outcome when it comes.
    """
    free = nullcontext() if concurrency is None else asyncio.Semaphore(concurrency)
    begun = time.perf_counter()

    async def one(request: PlannedRequest) -> Outcome:
        await asyncio.sleep(max(0.0, begun + request.at_s - time.perf_counter()))
        async with free:
            outcome = await client.send(target, request, begun=begun)
        on_end(outcome)
        return outcome

    return list(await asyncio.gather(*(one(request) for request in requests)))


def _told(response: httpx.Response) -> str:
    try:
        return error_message(response.json())
    except ValueError:
        return error_message(response.text.strip() or response.reason_phrase)


def _network_error(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
