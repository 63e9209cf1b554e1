"""What every request passes on its way in: counting, the host, the API key, and the body's limits. Plain ASGI."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Final, final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from piecework.server.errors import ApiError
from piecework.server.figures.metrics import Metrics
from piecework.server.log import EventLog
from piecework.server.responses import PROTECTED
from piecework.server.settings import Limits

_LOOK_S: Final = 0.25  # between two looks whether the server ends, while a body is awaited
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET: Final = re.compile(rb"[\[\]{}]")


@final
class Counted:
    """Counts answers by path and status, and logs them where asked to.

    Args:
        app: what answers.
        metrics: where they are counted.
        log: gets an event for each request, or None.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, log: EventLog | None) -> None:
        self._app = app
        self._metrics = metrics
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            # the route's own path: one label for each, whatever clients make up
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(path, status)
            if self._log is not None:
                client = scope.get("client") or ("",)
                self._log.event(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    seconds=time.perf_counter() - began,
                    client=client[0],
                )


@final
class KeyRequired:
    """Lets requests to the paths that need it through only with the API key."""

    def __init__(self, app: ASGIApp, *, api_key: str) -> None:
        self._app = app
        self._expected = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http" and scope["path"].startswith(PROTECTED):
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            # the time that this takes says nothing about how much of the key was right
            right = hmac.compare_digest(given.strip().encode("latin-1"), self._expected)
            if not right or scheme.lower() != "bearer":
                error = ApiError(
                    401,
                    "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.to_response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


@final
class KnownHost:
    """Answers requests to addresses, to localhost and to the names given, and refuses other names with 421.

    A page that a browser shows may call the server under a name of its own, which its author lets point here; it then
    reads what the server answers.
    """

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts) | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            if not self._is_known(host):
                error = ApiError(421, f"this server doesn't answer as {host!r}; start it with --allowed-host {host!r}")
                await error.to_response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_known(self, host: str) -> bool:
        name = host.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") == 1:
            name = name.partition(":")[0]
        if not name or name in self._hosts or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


@final
class JsonBody:
    """Reads the body of requests that have one, within limits, and refuses what isn't JSON by its Content-Type.

    A body that says it is too large isn't read at all; one that doesn't is read up to the limit.

    Args:
        app: what answers.
        limits: of bytes, of time, and of levels of nesting.
        is_draining: whether the server ends, so that no more is waited for.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits, is_draining: Callable[[], bool]) -> None:
        self._app = app
        self._most = limits.body_bytes
        self._limits = limits
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(headers)
            body = await self._read(receive)
            _check_text(body or b"", nesting=self._limits.nesting)
        except ApiError as error:
            await error.to_response()(scope, receive, send)
            return
        if body is None:
            return  # the client went away
        handed_on = False

        async def replay() -> Message:
            nonlocal handed_on
            if handed_on:
                return await receive()
            handed_on = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _check(self, headers: Headers) -> None:
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._most:
            raise self._too_large()
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and (length != "0" or kind):
            found = f"Content-Type {kind}" if kind else "no Content-Type"
            raise ApiError(415, f"{found}; the body must be application/json")

    async def _read(self, receive: Receive) -> bytes | None:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._next(receive)
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._most:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _next(self, receive: Receive) -> Message:
        waited_s = 0.0
        while True:
            try:
                return await asyncio.wait_for(receive(), _LOOK_S)
            except TimeoutError:
                waited_s += _LOOK_S
            if self._is_draining():
                raise ApiError(503, "the server is shutting down", headers={"Connection": "close"})
            if waited_s >= self._limits.receive_s:
                found = f"nothing more of the body came for {self._limits.receive_s:g} seconds"
                raise ApiError(408, found, headers={"Connection": "close"})

    def _too_large(self) -> ApiError:
        # the rest of the body is still on its way: the connection can't be used again
        return ApiError(413, f"the body is larger than {self._most} bytes", headers={"Connection": "close"})


def _check_text(body: bytes, *, nesting: int) -> None:
    """Raise ApiError for what JSON's parsers let pass, or fail of, and nothing behind them can take.

    That is text with half of a surrogate pair, in bytes or by an escape, and values that are nested too deep.
    """
    try:
        body.decode()
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    if body.count(b"[") + body.count(b"{") > nesting and depth_of(body) > nesting:
        raise ApiError(400, f"the body is nested deeper than {nesting} levels")
    if b"\\u" not in body:
        return
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body has text that is no Unicode: half of a surrogate pair") from None
    except (ValueError, RecursionError):
        return  # no JSON: whoever reads it says so


def depth_of(body: bytes) -> int:
    """Return how deep JSON is nested: the most brackets that are open at one place, outside of strings."""
    deepest = depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", body)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest
