"""What every request passes on its way in: counting, the API key, and the limit of the body. Plain ASGI."""

from __future__ import annotations

import hmac
import json
import time
from typing import Final, final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from piecework.server.errors import ApiError
from piecework.server.log import EventLog
from piecework.server.metrics import Metrics

_PROTECTED: Final = "/v1/"


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
            self._metrics.requests.labels(path, str(status)).inc()
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
    """Lets requests to /v1/ through only with the API key."""

    def __init__(self, app: ASGIApp, *, api_key: str) -> None:
        self._app = app
        self._expected = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http" and scope["path"].startswith(_PROTECTED):
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
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


@final
class JsonBody:
    """Reads the body of requests that have one, up to a limit, and refuses what isn't JSON by its Content-Type.

    A body that says it is too large isn't read at all; one that doesn't is read up to the limit.
    """

    def __init__(self, app: ASGIApp, *, most_bytes: int) -> None:
        self._app = app
        self._most = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(headers)
            body = await self._read(receive)
            _check_text(body or b"")
        except ApiError as error:
            await error.response()(scope, receive, send)
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
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._most:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        # the rest of the body is still on its way: the connection can't be used again
        return ApiError(413, f"the body is larger than {self._most} bytes", headers={"Connection": "close"})


def _check_text(body: bytes) -> None:
    """Raise ApiError where a string of the body is half of a surrogate pair, which no tokenizer or log can take.

    JSON can write such strings only with escapes, and its parsers let them pass.
    """
    if b"\\u" not in body:
        return
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body has text that is no Unicode: half of a surrogate pair") from None
    except (ValueError, RecursionError):
        return  # no JSON: whoever reads it says so
