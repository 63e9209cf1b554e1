"""What the server says while it runs: one line per event, on stderr, for people or as JSON for machines."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO, final


@final
class EventLog:
    """Writes events. May be shared between threads: an event is one write.

    Args:
        stream: where to, or None to write nothing.
        as_json: whether lines are JSON objects.
        clock: seconds since 1970.
    """

    def __init__(self, stream: TextIO | None, *, as_json: bool = False, clock: Callable[[], float] = time.time) -> None:
        self._stream = stream
        self._as_json = as_json
        self._clock = clock

    def event(self, name: str, **fields: Any) -> None:
        """Write one event with its fields; values of None are left out."""
        if self._stream is None:
            return
        when = datetime.fromtimestamp(self._clock(), tz=UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        given = {key: value for key, value in fields.items() if value is not None}
        if self._as_json:
            line = json.dumps({"time": when, "event": name, **given}, default=str)
        else:
            line = " ".join([when, name, *(f"{key}={_plain(value)}" for key, value in given.items())])
        self._stream.write(line + "\n")
        self._stream.flush()

    def failure(self, name: str, error: BaseException, **fields: Any) -> None:
        """Write an event for an exception that nobody expected, with its traceback."""
        trace = "".join(traceback.format_exception(error))
        self.event(name, error=f"{type(error).__name__}: {error}", **fields, trace=trace)


@final
class LoggingBridge(logging.Handler):
    """Passes what a library logs (uvicorn, say) on to an EventLog."""

    def __init__(self, log: EventLog, *, name: str) -> None:
        super().__init__(level=logging.WARNING)
        self._log = log
        self._event = name

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, asyncio.CancelledError):
            return  # a request that was cut off at the end of a drain, which has an event of its own
        trace = None if error is None else "".join(traceback.format_exception(error))
        self._log.event(self._event, level=record.levelname.lower(), message=record.getMessage(), trace=trace)


def _plain(value: object) -> str:
    """Write a value for people; one with spaces or control characters as a JSON string, so that an event is a line."""
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    plain = text and text.isprintable() and " " not in text and '"' not in text
    return text if plain else json.dumps(text)
