"""Run an application under uvicorn until it is told to end, letting requests that run finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, Final, final

import uvicorn
from fastapi import FastAPI

from piecework.server.log import EventLog, LoggingBridge
from piecework.server.settings import Limits

_UVICORN: Final = "uvicorn.error"  # the name of its logger for everything but accesses
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


@final
class HttpServer:
    """Answers requests of one application.

    Args:
        app: what answers.
        listening: where; closed at the end.
        limits: see `Limits`; after `drain_s` requests that still run at the end are cut off.
        log: gets uvicorn's warnings and errors.
        on_drain: called, in the event loop, when the end begins.
        stop: begins the end when any thread sets it.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        listening: socket.socket,
        limits: Limits,
        log: EventLog,
        on_drain: Callable[[], None],
        stop: threading.Event | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=max(1, round(limits.drain_s)),
            timeout_keep_alive=max(1, round(limits.receive_s)),
            ws="none",
        )
        self._server = _UvicornServer(config, limits=limits, on_drain=on_drain, stop=stop or threading.Event())
        self._listening = listening
        self._log = log

    def run(self) -> None:
        """Answer until the end begins, and return when requests that run are finished; in the main thread.

        Raises what the event loop fails with.
        """
        logger = logging.getLogger(_UVICORN)
        bridge = LoggingBridge(self._log, name="http")
        logger.addHandler(bridge)
        logger.propagate = False
        try:
            with _signals_ignored():
                asyncio.run(self._server.serve(sockets=[self._listening]))
        finally:
            logger.removeHandler(bridge)
            self._listening.close()


@final
class _UvicornServer(uvicorn.Server):
    """uvicorn's server, which says when it begins to end, and ends on more than signals."""

    def __init__(
        self, config: uvicorn.Config, *, limits: Limits, on_drain: Callable[[], None], stop: threading.Event
    ) -> None:
        super().__init__(config)
        self._idle = IdleConnections(most=limits.connections, most_s=limits.receive_s)
        self._on_drain = on_drain
        self._stop = stop

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; asked ten times a second."""
        self._idle.look(self.server_state.connections, now_s=time.monotonic())
        return await super().on_tick(counter) or self._stop.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what runs finish."""
        self._on_drain()
        await super().shutdown(sockets)


@final
class IdleConnections:
    """Closes connections that have no request: each after some time, and the longest idle where there are too many.

    uvicorn ends those that have had a request; one that sends nothing, or half a request's head, it keeps for ever.

    Args:
        most: connections, those with a request included.
        most_s: seconds that one may have none.
    """

    def __init__(self, *, most: int, most_s: float) -> None:
        self._most = most
        self._most_s = most_s
        self._since: dict[Any, tuple[Any, float]] = {}

    def look(self, connections: Iterable[Any], *, now_s: float) -> None:
        """Close those among uvicorn's protocol objects that are idle for too long."""
        every = list(connections)
        idle = [c for c in every if c.cycle is None or c.cycle.response_complete]
        since: dict[Any, tuple[Any, float]] = {}
        for connection in idle:
            before = self._since.get(connection)
            same = before is not None and before[0] is connection.cycle
            since[connection] = before if same and before is not None else (connection.cycle, now_s)
        self._since = since
        longest = sorted(idle, key=lambda connection: since[connection][1])
        for number, connection in enumerate(longest):
            if now_s - since[connection][1] > self._most_s or number < len(every) - self._most:
                connection.transport.close()


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """Let the signals that end the server do nothing more once it has ended: uvicorn raises them again then."""

    def ignore(_signal: int, _frame: FrameType | None) -> None:
        return

    before = {number: signal.signal(number, ignore) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
