"""Run an application under uvicorn until it is told to end, letting requests that run finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final, final

import uvicorn
from fastapi import FastAPI

from piecework.server.log import EventLog, LoggingBridge

_UVICORN: Final = "uvicorn.error"  # the name of its logger for everything but accesses
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


@final
class HttpServer:
    """Answers requests of one application.

    Args:
        app: what answers.
        listening: where; closed at the end.
        drain_s: seconds after which requests that still run at the end are cut off.
        log: gets uvicorn's warnings and errors.
        on_drain: called, in the event loop, when the end begins.
        stop: begins the end when any thread sets it.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        listening: socket.socket,
        drain_s: float,
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
            timeout_graceful_shutdown=max(1, round(drain_s)),
            timeout_keep_alive=30,
            ws="none",
        )
        self._server = _UvicornServer(config, on_drain=on_drain, stop=stop or threading.Event())
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

    def __init__(self, config: uvicorn.Config, *, on_drain: Callable[[], None], stop: threading.Event) -> None:
        super().__init__(config)
        self._on_drain = on_drain
        self._stop = stop

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; asked ten times a second."""
        return await super().on_tick(counter) or self._stop.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what runs finish."""
        self._on_drain()
        await super().shutdown(sockets)


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
