"""Servers that run for a while, each in a process of its own, and a slow link to one."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common.launch import ROOT, CellError

_START_S = 60.0


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], *, port: int, log: Path) -> Iterator[None]:
    """Run an HTTP server until the block is left. Raises CellError where it doesn't answer within a minute."""
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT) as process:
        try:
            _wait(process, port, log)
            yield
        finally:
            process.terminate()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise CellError(asked=f"start {process.args}", found=log.read_text()[-500:], try_="run that command by hand")  # type: ignore[str-bytes-safe]


def registry_command() -> str | None:
    """Return the command of Debian's docker-registry, or None where it isn't installed."""
    return shutil.which("docker-registry") or shutil.which("registry")


@contextlib.contextmanager
def registry(place: Path, *, command: str) -> Iterator[int]:
    """Run a registry that keeps its data in a directory; gives its port. Raises CellError."""
    port, config = free_port(), place / "config.yml"
    config.write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {place}/data\nhttp:\n  addr: 127.0.0.1:{port}\n"
    )
    with running([command, "serve", str(config)], port=port, log=place / "log"):
        yield port


@contextlib.contextmanager
def slow_link(port: int, *, round_trip_ms: float, log: Path) -> Iterator[int]:
    """Give another port of the same server, over a link that takes so long for each way there and back."""
    slow = free_port()
    command = [sys.executable, "-m", "benchmarks.cells.slow_link", str(slow), str(port), str(round_trip_ms)]
    with running(command, port=slow, log=log):
        yield slow
