"""Run one cell: a new process, with caches of its own, timed from outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, final

from piecework.errors import PieceworkError
from piecework.foundation.environment import child_variables

TIMEOUT_S: Final = 1200.0
_GRACE_S: Final = 15.0
_SHOWN_LINES: Final = 6
ROOT: Final = Path(__file__).resolve().parents[2]
_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class CellError(PieceworkError):
    """A measured process failed, printed no figures, or took too long."""


@dataclass(frozen=True)
class Caches:
    """Where a process and its children keep what they cache; `warm` says that one was there before."""

    root: Path
    warm: bool

    def variables(self) -> dict[str, str]:
        """Return the environment variables that point there. torch keeps precompiled headers under TMPDIR."""
        places = {"PIECEWORK_HOME": "piecework", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TMPDIR": "tmp"}
        return {name: str(self.root / place) for name, place in places.items()}


@dataclass(frozen=True)
class Ran:
    """A process that ended well: seconds from its start to its end and to its first output, and what it printed."""

    wall_s: float
    first_output_s: float
    figures: Mapping[str, Any]


@final
class Launcher:
    """Runs processes whose caches lie under `root`.

    Args:
        root: an existing directory.
        timeout_s: most seconds a process may take.
    """

    def __init__(self, root: Path, *, timeout_s: float = TIMEOUT_S) -> None:
        self._root = root
        self._timeout_s = timeout_s

    def caches(self, name: str, *, fresh: bool) -> Caches:
        """Return the caches called `name`, which may have slashes; emptied first if they are to be `fresh`."""
        root = self._root / "caches" / name
        if fresh:
            shutil.rmtree(root, ignore_errors=True)
        warm = root.exists()
        (root / "tmp").mkdir(parents=True, exist_ok=True)
        return Caches(root, warm)

    def piecework(self, *words: str, caches: Caches) -> Ran:
        """Run `piecework WORDS --json`. Raises CellError."""
        return self.run([sys.executable, "-m", "piecework", *words, "--json"], variables=caches.variables())

    def cell(self, name: str, *words: str, caches: Caches) -> Ran:
        """Run one of `benchmarks.cells`. Raises CellError."""
        return self.run([sys.executable, "-m", f"benchmarks.cells.{name}", *words], variables=caches.variables())

    def run(self, command: Sequence[str], *, variables: Mapping[str, str | None], prints: bool = True) -> Ran:
        """Run a command to its end.

        Args:
            command: the program and its arguments.
            variables: changes to this process's environment.
            prints: whether its last line of output is a JSON object with its figures.

        Raises CellError.
        """
        with tempfile.TemporaryFile(dir=self._root) as log:
            begun = time.perf_counter()
            # a process group of its own, so that all of it can be ended
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,  # where `python -m benchmarks.cells.…` is found
                env=child_variables({**_OFFLINE, **variables}),
                process_group=0,
            )
            timer = threading.Timer(self._timeout_s, _kill, args=(child,))
            timer.start()
            try:
                assert child.stdout is not None
                printed = os.read(child.stdout.fileno(), 1)
                first_output_s = time.perf_counter() - begun
                printed += child.stdout.read()
                code = child.wait()
                wall_s = time.perf_counter() - begun
            except BaseException:
                _end(child)
                raise
            finally:
                timer.cancel()
                child.stdout and child.stdout.close()
            if code:
                late = wall_s >= self._timeout_s
                found = f"no end after {self._timeout_s:.0f} s" if late else f"exit code {code}: {_last_lines(log)}"
                raise _failed(command, found)
        return Ran(wall_s, first_output_s, _figures(printed, command) if prints else {})


def _figures(printed: bytes, command: Sequence[str]) -> Mapping[str, Any]:
    lines = printed.decode(errors="replace").strip().splitlines()
    try:
        figures = json.loads(lines[-1]) if lines else None
    except ValueError:
        figures = None
    if not isinstance(figures, dict):
        raise _failed(command, f"no JSON object in its last line: {lines[-1][:200] if lines else 'it printed nothing'}")
    return figures


def _failed(command: Sequence[str], found: str) -> CellError:
    return CellError(asked=" ".join(command), found=found, try_="run that command by hand")


def _last_lines(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    return " / ".join(line.strip() for line in lines[-_SHOWN_LINES:] if line.strip())


def _kill(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Let the child clean up, then make sure that it is gone."""
    child.terminate()
    try:
        child.wait(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        _kill(child)
        child.wait()
