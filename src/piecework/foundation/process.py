"""Facts about this process, for measurements."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

_IMPORTED = time.monotonic()


def seconds_since_start() -> float:
    """Return the seconds since the operating system started this process (since this import where it doesn't say)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _IMPORTED


def peak_rss_bytes() -> int:
    """Return the most memory this process has had resident, in bytes."""
    import resource  # noqa: PLC0415  POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def garbage_collection_off() -> Iterator[None]:
    """For code that makes many long-lived objects: collecting cycles meanwhile walks all of torch (90 ms) in vain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
