"""Say so when something makes no progress for long."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from piecework.foundation.flight import REPORT_S

_LOG = logging.getLogger("piecework")


@contextlib.contextmanager
def watched(describe: Callable[[], str], *, report_s: float = REPORT_S) -> Iterator[Callable[[], None]]:
    """Warn when the block makes no progress for `report_s` seconds, again after twice that time, and so on.

    Args:
        describe: says what is going on, when the time comes; called in another thread.

    Yields what is to be called when there is progress.
    """
    over = threading.Event()
    since, next_s = time.monotonic(), report_s

    def progress() -> None:
        nonlocal since, next_s
        since, next_s = time.monotonic(), report_s

    def watch() -> None:
        nonlocal next_s
        while not over.wait(max(0.0, min(since + next_s - time.monotonic(), report_s))):
            passed_s = time.monotonic() - since
            if passed_s >= next_s:
                _LOG.warning("no progress for %.0f s: %s", passed_s, describe())
                next_s = 2 * max(next_s, passed_s)

    thread = threading.Thread(target=watch, name="piecework-watch", daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        over.set()
