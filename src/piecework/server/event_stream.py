"""Server-sent events, and work that ends when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar, final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from piecework.server.responses import Answered

T = TypeVar("T")
Emit = Callable[[bytes], Awaitable[None]]
Produce = Callable[[Emit], Coroutine[Any, Any, None]]

DONE: Final = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


def event(value: Answered) -> bytes:
    """Return an answer, or a part of one, as an event; one that has a type is named by it, too."""
    name = getattr(value, "type", None)
    head = f"event: {name}\n".encode() if isinstance(name, str) else b""
    return head + b"data: " + value.to_bytes() + b"\n\n"


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it and raise ClientGone where the client goes away first.

    The request's body must have been read.
    """
    return await _while_connected(request.receive, work)


@final
class EventStream(Response):
    """A stream of events that ends, with the work behind it, when the client goes away.

    Args:
        produce: is called with a function that sends bytes, and awaited; it is cancelled when the client goes away.
        on_end: called once when it is over, however it ended; with whether the client went away.
    """

    media_type = "text/event-stream"

    def __init__(self, produce: Produce, *, on_end: Callable[[bool], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]  # nobody knows yet
        self._produce = produce
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""
        gone = False

        async def emit(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async def answer() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._produce(emit)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await _while_connected(receive, answer())
        except ClientGone:
            gone = True
        finally:
            self._on_end(gone)


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        # also when this task is cancelled, at the end of a drain: nothing goes on behind our back
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await receive()
