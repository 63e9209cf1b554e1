"""A compile in a process of its own, started by command: whoever wants a bundle never imports the compiler."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from piecework.errors import CompileError, PieceworkError, WeightsError
from piecework.foundation.environment import TRUST_VARIABLE, child_variables
from piecework.foundation.process import python_command
from piecework.spec.model_spec import ModelSpec

_STEP: Final = re.compile(r"\[(\d+)/(\d+)\] (.*)")
_STOP_S: Final = 10.0


@dataclass(frozen=True)
class CompileStep:
    """What a compile is doing: `done` of `total` pieces are over; 0 of 0 where that isn't known yet."""

    text: str
    done: int = 0
    total: int = 0


def parse_step(line: str) -> CompileStep:
    """Return what a line that `piecework compile` writes to stderr says."""
    found = _STEP.fullmatch(line)
    return CompileStep(line) if found is None else CompileStep(found[3], int(found[1]), int(found[2]))


@final
class CompileProcess:
    """`piecework compile` for one model, into the local store. May be stopped from another thread.

    Args:
        spec: which model, compiled how.
        trust: as `EngineOptions` has it.
        weights: whether the model's weights must be there, and as the model needs them, before anything is compiled.
    """

    def __init__(self, spec: ModelSpec, *, trust: Path | None = None, weights: bool = False) -> None:
        self._variables = child_variables({} if trust is None else {TRUST_VARIABLE: str(trust)})
        options = ["--spec", spec.to_json(), "--weights", "real" if weights else "none"]
        options += ["--json", "--parent", str(os.getpid())]
        self._command = python_command("piecework", "compile", *options)
        self._mutex = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def run(self, on_line: Callable[[str], None] | None) -> Path:
        """Compile and return the bundle's path.

        Args:
            on_line: gets each line that the process writes to stderr; None lets it write to this process's own.

        Raises WeightsError where that is what it fails with, and else CompileError.
        """
        lines: list[str] = []
        with self._start(piped=on_line is not None) as process:
            try:
                assert process.stdout is not None
                # read beside stderr: either pipe may fill up first
                reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
                reader.start()
                for line in process.stderr or ():
                    assert on_line is not None
                    on_line(line.rstrip("\n"))
                reader.join()
            except BaseException:
                self.stop()
                raise
        return _path(process.returncode, "".join(lines), stopped=self._stopped)

    def _start(self, *, piped: bool) -> subprocess.Popen[str]:
        with self._mutex:
            if self._stopped:
                raise _failed({"found": "it was stopped"})
            self._process = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if piped else None,
                text=True,
                env=self._variables,
            )
            return self._process

    def stop(self) -> None:
        """End the process, if it runs, and its workers with it."""
        with self._mutex:
            self._stopped = True
            process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()  # it unwinds, as for Ctrl-C, and ends its own workers
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
            return
        process.kill()
        process.wait()


def _path(code: int, output: str, *, stopped: bool) -> Path:
    try:
        answer = json.loads(output)
    except ValueError:
        answer = {}
    if code == 0 and "bundle" in answer:
        return Path(answer["bundle"])
    raise _failed({"found": "it was stopped"} if stopped else answer)


def _failed(answer: dict[str, str]) -> PieceworkError:
    kind = WeightsError if answer.get("error") == WeightsError.__name__ else CompileError
    return kind(
        asked=answer.get("asked", "compile the model"),
        found=answer.get("found", "the compile's process failed"),
        try_=answer.get("try", "run `piecework compile MODEL --debug`"),
    )
