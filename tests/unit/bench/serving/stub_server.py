"""A server of raw bytes: it answers each request as it is told to, right or wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

Answer = AsyncIterator[bytes]
MODELS = {"object": "list", "data": [{"id": "stub-model", "object": "model"}]}


def http(body: bytes, *, status: str = "200 OK", kind: str = "application/json") -> bytes:
    """Return a whole answer."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return head.encode() + body


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nconnection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def text_event(text: str, *, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]})


def usage_event(given: int, generated: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": given, "completion_tokens": generated}})


class StubServer:
    """Notes what it was sent: `seen` has (path, headers, body) of each request for text."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], Answer], models: bytes) -> None:
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.now = self.most = 0
        self.url = ""
        self.tasks: set[asyncio.Task[Any]] = set()
        self._answer = answer
        self._models = models

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._handle(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        method, path, _ = first.split(" ")
        if method == "GET":
            writer.write(self._models)
            await writer.drain()
            return
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        number = len(self.seen)
        self.seen.append((path, headers, body))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            async for data in self._answer(number, body):
                writer.write(data)
                await writer.drain()
        finally:
            self.now -= 1


@contextlib.contextmanager
def stub_server(
    answer: Callable[[int, dict[str, Any]], Answer], *, models: bytes | None = None
) -> Iterator[StubServer]:
    """Run a server until the block is left. `answer(number, body)` yields the bytes of each answer."""
    stub = StubServer(answer, http(json.dumps(MODELS).encode()) if models is None else models)
    ready = threading.Event()
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        server = await asyncio.start_server(stub.handle, "127.0.0.1", 0)
        stub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ended = asyncio.Event()
        loops.append((asyncio.get_running_loop(), ended))
        ready.set()
        await ended.wait()
        server.close()
        await asyncio.gather(*stub.tasks)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield stub
    finally:
        loop, ended = loops[0]
        loop.call_soon_threadsafe(ended.set)
        thread.join(timeout=10)


async def good_answer(number: int, body: dict[str, Any]) -> Answer:
    """Yield an answer of as many tokens as were asked for."""
    count = body["max_tokens"]
    yield STREAM
    for place in range(count):
        yield text_event(f"t{place}", finish_reason="length" if place == count - 1 else None)
    given = len(body["prompt"]) if isinstance(body["prompt"], list) else 2 * len(body["prompt"].split())
    yield usage_event(given, count)
    yield DONE
