"""The driver's side of the worker process: start it early, give it jobs, see events, end it whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piecework import errors
from piecework.compiler.backends.toolchain import Toolchain, likely_flags, likely_interface
from piecework.errors import CompileError, InternalError, PieceworkError, ShapeContractError
from piecework.foundation.environment import child_variables
from piecework.foundation.process import python_command
from piecework.foundation.target import Target

if TYPE_CHECKING:
    from piecework.compiler.job import Job  # it imports torch, and the worker starts before that


@dataclass(frozen=True)
class Outcome:
    """What came of jobs, by name: artifact files, and those whose code would hold for a part of their range only."""

    paths: Mapping[str, Path]
    narrowed: Mapping[str, ShapeContractError]


class WorkerPool:
    """A worker process and a build of the toolchain's prefix, both started before there is anything to compile."""

    def __init__(self, *, toolchain: Toolchain, scratch: Path, target: Target, jobs: int, device: str) -> None:
        self._toolchain = toolchain
        self._scratch = scratch
        command = python_command("piecework.compiler.backends.worker", "--toolchain", str(toolchain.root))
        command += ["--compiler", toolchain.compiler, "--compiler-version", toolchain.version]
        command += ["--scratch", str(scratch), "--jobs", str(jobs)]
        variables = child_variables(
            {
                "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
                "TMPDIR": str(scratch),
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                # a process that has touched CUDA can't fork workers; those for the CPU need not see it
                **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
            }
        )
        self._log = (scratch / "worker.log").open("w+")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
            env=variables,
        )
        self._prefix_compiler: subprocess.Popen[str] | None = None
        self._closed = False
        self._prefix_builder = threading.Thread(target=self._build_prefix, args=(target,), daemon=True)
        self._prefix_builder.start()

    def _build_prefix(self, target: Target) -> None:
        flags, interface = likely_flags(target), likely_interface()
        if flags is not None and interface is not None:
            with contextlib.suppress(PieceworkError, OSError):  # workers build it again and report what is wrong
                self._toolchain.prefix(flags, on_start=self._note_prefix_compiler)
                self._toolchain.runtime(flags, interface=interface, on_start=self._note_prefix_compiler)

    def _note_prefix_compiler(self, process: subprocess.Popen[str]) -> None:
        self._prefix_compiler = process
        if self._closed:
            end_group(process)

    def run(self, jobs: Mapping[str, Job], *, on_event: Callable[[Mapping[str, Any]], None]) -> Outcome:
        """Compile all `jobs` (name → job), the longest first; their libraries lie in the scratch directory.

        Raises the first error of a job as what it was: CompileError, StoreError …
        """
        assert self._process.stdin is not None
        try:
            for name, job in sorted(jobs.items(), key=lambda item: -len(item[1].program.calls)):
                request = {"job": name, "work": job.to_json(), "directory": str(self._scratch / f"job-{name[:24]}")}
                self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        done: dict[str, Path] = {}
        narrowed: dict[str, ShapeContractError] = {}
        for event in self._events():
            on_event(event)
            if event["event"] == "failed":
                error = _error(event)
                if not isinstance(error, ShapeContractError):
                    raise error
                narrowed[event["job"]] = error
            if event["event"] == "done":
                done[event["job"]] = Path(event["path"])
            if len(done) + len(narrowed) == len(jobs):
                return Outcome(done, narrowed)
        raise self._died()

    def _events(self) -> Iterator[dict[str, Any]]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield json.loads(line)

    def _died(self) -> CompileError:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return CompileError(
            asked="compile the model's pieces in a worker process",
            found=f"it ended early: {' / '.join(lines[-3:])[:500] or 'without a word'}",
            try_="run `piecework doctor`",
        )

    def close(self) -> None:
        """End the worker, its children and their compilers; returns when they are gone."""
        self._closed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # also where the worker is dead: its children may not be
        if self._prefix_compiler is not None:
            end_group(self._prefix_compiler)
        self._process.wait()
        self._prefix_builder.join(timeout=10)
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def end_group(process: subprocess.Popen[str]) -> None:
    """End a process that leads a group of its own, with the group; one that has been waited for has ended already."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _error(event: Mapping[str, Any]) -> Exception:
    kind = getattr(errors, event.get("error", ""), None)
    if kind is None or not isinstance(kind, type) or not issubclass(kind, PieceworkError):
        return InternalError(event.get("found", "a worker failed") + "\n" + event.get("trace", ""))
    return kind(
        asked=event.get("asked", "compile a piece"), found=event.get("found", "it failed"), try_=event.get("try", "")
    )
