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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piecework import errors
from piecework.compiler.backends.toolchain import Toolchain, likely_flags, likely_interface
from piecework.errors import CompileError, InternalError, PieceworkError, ShapeContractError
from piecework.foundation.environment import child_variables
from piecework.foundation.process import descendants, python_command
from piecework.foundation.target import Target
from piecework.foundation.watch import watched

if TYPE_CHECKING:
    from piecework.compiler.job import Job  # it imports torch, and the worker starts before that


class WorkerPool:
    """A worker process and a build of the toolchain's prefix, both started before there is anything to compile."""

    def __init__(self, *, toolchain: Toolchain, scratch: Path, target: Target, jobs: int, device: str) -> None:
        self._toolchain = toolchain
        self._scratch = scratch
        command = python_command("piecework.compiler.backends.worker", "--toolchain", str(toolchain.root))
        command += ["--compiler", toolchain.compiler, "--compiler-version", toolchain.version]
        command += ["--scratch", str(scratch), "--jobs", str(jobs), "--overtake-s", str(toolchain.overtake_s)]
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

    def run(
        self,
        jobs: Mapping[str, Job],
        *,
        on_event: Callable[[Mapping[str, Any]], None],
        on_made: Callable[[str, Path], None],
    ) -> Mapping[str, ShapeContractError]:
        """Compile all `jobs` (name → job), the longest first; arguments and result are as for `Backend.compile`.

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
        narrowed: dict[str, ShapeContractError] = {}
        left, running = set(jobs), dict[str, int]()
        with watched(lambda: self._doing(jobs, running)) as progress:
            for event in self._events():
                progress()
                if event["event"] == "start":
                    running[event["job"]] = event["pid"]
                elif event["event"] == "failed":
                    error = _error(event)
                    if not isinstance(error, ShapeContractError):
                        raise error
                    narrowed[event["job"]] = error
                elif event["event"] == "done":
                    on_made(event["job"], Path(event["path"]))
                on_event(event)
                if event["event"] in ("failed", "done"):
                    left.remove(event["job"])
                    del running[event["job"]]
                if not left:
                    return narrowed
        raise self._died()

    def _doing(self, jobs: Mapping[str, Job], running: Mapping[str, int]) -> str:
        """Say what the worker is doing, for people."""
        if not running:
            return f"the compiler is being imported in process {self._process.pid}"
        pieces = [
            f"a piece of {len(jobs[name].program.calls)} operators is being compiled in process {pid}"
            + "".join(f", by {command} (process {child})" for child, command in descendants(pid).items())
            for name, pid in list(running.items())
        ]
        waits = [line for line in self._last_words() if line.startswith("waiting for ")]
        return "; ".join([*pieces, *waits[-1:]])

    def _last_words(self) -> list[str]:
        """Return the last lines that the worker and its children have written."""
        return Path(self._log.name).read_text(errors="replace").strip().splitlines()[-3:]

    def _events(self) -> Iterator[dict[str, Any]]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield json.loads(line)

    def _died(self) -> CompileError:
        return CompileError(
            asked="compile the model's pieces in a worker process",
            found=f"it ended early: {' / '.join(self._last_words())[:500] or 'without a word'}",
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
