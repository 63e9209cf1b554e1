"""A server on a free port, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from piecework.server.app import make_app
from piecework.server.listening import listen, url_of
from piecework.server.settings import ServerSettings
from piecework.server.status import ServerStatus


@contextlib.contextmanager
def live_server(status: ServerStatus, settings: ServerSettings, **options: Any) -> Iterator[str]:
    """Run a server until the block is left; gives its URL."""
    listening = listen("127.0.0.1", port=0)
    app = make_app(status, settings, **options)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        yield url_of(listening)
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listening.close()
        assert not thread.is_alive()


def eventually(holds: Any, *, seconds: float = 5.0) -> bool:
    """Wait until `holds()` is true; False where it never is."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.01)
    return bool(holds())
