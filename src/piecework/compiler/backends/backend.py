"""Backends: from jobs to artifact files, behind one interface."""

from __future__ import annotations

import os
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from piecework.compiler.backends.pool import WorkerPool, end_group
from piecework.compiler.backends.toolchain import Toolchain
from piecework.errors import ShapeContractError
from piecework.foundation import files, leases
from piecework.foundation.digests import canonical_json
from piecework.foundation.target import Target

if TYPE_CHECKING:
    from piecework.compiler.job import Job  # it imports torch, and workers start before that

OnEvent = Callable[[Mapping[str, Any]], None]
OnMade = Callable[[str, Path], None]
"""Is given a job's name and the file that was made of it, as soon as it is there."""


class Backend(ABC):
    """Compiles jobs. Made before there are any, so that it can prepare meanwhile; closed whatever happens."""

    @abstractmethod
    def compile(
        self, jobs: Mapping[str, Job], *, on_event: OnEvent, on_made: OnMade
    ) -> Mapping[str, ShapeContractError]:
        """Compile jobs by name; return, by name, why the code of some would hold for a part of their range only.

        Raises CompileError, StoreError.
        """

    def expect(self, jobs: Mapping[str, Job]) -> None:
        """Hear of jobs by name that will be compiled, by this backend or by another process; nothing need be done."""
        return None

    def build_kernel(self, source: Path, *, macros: tuple[str, ...]) -> Path | None:
        """Build a C++ file of ours into a library, in any thread; None where the backend has no C++ compiler.

        Raises CompileError, StoreError.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """End everything that was started."""


@final
class AotiBackend(Backend):
    """AOTInductor libraries, compiled in parallel worker processes.

    Args:
        toolchain: the C++ compiler, and where it keeps what it makes once per machine.
        scratch: directory for this compile's files.
        target: the CPU.
        device: device type of the pieces.
    """

    def __init__(self, toolchain: Toolchain, *, scratch: Path, target: Target, device: str) -> None:
        files.make_directory(toolchain.root)
        files.remove_stale_scratch(toolchain.root)
        leases.remove_dead(toolchain.root, pattern="**/*.lock")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = cores + 2  # pieces are few and of unequal length: with one per core, the last one leaves the others idle
        self._toolchain = toolchain
        self._scratch = scratch
        self._compilers: list[subprocess.Popen[str]] = []
        self._pool = WorkerPool(toolchain=toolchain, scratch=scratch, target=target, jobs=jobs, device=device)

    def compile(
        self, jobs: Mapping[str, Job], *, on_event: OnEvent, on_made: OnMade
    ) -> Mapping[str, ShapeContractError]:
        """See `Backend.compile`."""
        return self._pool.run(jobs, on_event=on_event, on_made=on_made)

    def build_kernel(self, source: Path, *, macros: tuple[str, ...]) -> Path | None:
        """See `Backend.build_kernel`."""
        directory = Path(tempfile.mkdtemp(dir=self._scratch, prefix="kernel-"))
        library = directory / "kernel.so"
        self._toolchain.compile_kernel(source, macros=macros, target=library, on_start=self._compilers.append)
        return library

    def close(self) -> None:
        """See `Backend.close`."""
        for compiler in self._compilers:
            end_group(compiler)
        self._pool.close()


@final
class EagerBackend(Backend):
    """Artifacts that hold the program itself; the runtime calls its operators one by one. For tests and debugging."""

    def __init__(self, *, scratch: Path) -> None:
        self._scratch = scratch

    def compile(
        self, jobs: Mapping[str, Job], *, on_event: OnEvent, on_made: OnMade
    ) -> Mapping[str, ShapeContractError]:
        """See `Backend.compile`."""
        from piecework.compiler.backends.interfaces import interface_of  # noqa: PLC0415  it imports torch

        for name, job in jobs.items():
            on_event({"event": "start", "job": name})
            made = self._scratch / f"{name}.json"
            made.write_bytes(
                canonical_json({"program": job.program.to_json(), "interface": interface_of(job).to_json()})
            )
            on_made(name, made)
            on_event({"event": "done", "job": name, "seconds": 0.0})
        return {}

    def close(self) -> None:
        """See `Backend.close`."""
