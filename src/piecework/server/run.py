"""Run an application under uvicorn until SIGTERM or Ctrl-C, letting requests that run finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final, final

import uvicorn
from fastapi import FastAPI

from piecework.errors import CapacityError
from piecework.server.log import EventLog, LoggingBridge

_UVICORN: Final = "uvicorn.error"  # the name of its logger for everything but accesses
_BACKLOG: Final = 2048
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def listen(host: str, *, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises CapacityError where it can't be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise CapacityError(
            asked=f"listen on {host}, port {port}",
            found=str(error),
            try_="another --port (0 takes a free one) or another --host",
        ) from error


def url_of(listening: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_app(
    app: FastAPI, *, listening: socket.socket, drain_s: float, log: EventLog, on_drain: Callable[[], None]
) -> None:
    """Answer requests until SIGTERM or SIGINT, and return when those that run are finished.

    Args:
        app: what answers.
        listening: where; closed at the end.
        drain_s: seconds after which requests that still run are cut off.
        log: gets uvicorn's warnings and errors.
        on_drain: called, in a signal handler, when the end begins.
    """
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
    logger = logging.getLogger(_UVICORN)
    bridge = LoggingBridge(log, name="http")
    logger.addHandler(bridge)
    logger.propagate = False
    try:
        with _signals_ignored():
            asyncio.run(_DrainingServer(config, on_drain).serve(sockets=[listening]))
    finally:
        logger.removeHandler(bridge)
        listening.close()


@final
class _DrainingServer(uvicorn.Server):
    """uvicorn's server, which says when it begins to end."""

    def __init__(self, config: uvicorn.Config, on_drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_drain = on_drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end, at a signal."""
        self._on_drain()
        super().handle_exit(sig, frame)


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
