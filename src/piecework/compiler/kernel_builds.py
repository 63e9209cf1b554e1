"""Build the native kernels that a graph's operators have, while its pieces are compiled.

A kernel is built once per machine and element type: the store has it the next time. Where building fails, the record
says so, and the bundle does without: the operators' plain implementations are right everywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from piecework.bundle.facts import Fact, source_facts
from piecework.bundle.format import FORMAT
from piecework.bundle.store.interface import Artifact
from piecework.bundle.store.lookup import find_artifact
from piecework.compiler.backends.toolchain import KERNEL_FLAGS
from piecework.compiler.setup import CompileSetup
from piecework.compiler.split import OpaqueCall, Step
from piecework.errors import CompileError
from piecework.foundation.digests import canonical_json, digest_file, digest_json
from piecework.foundation.flight import Flight
from piecework.foundation.notes import INTERFACE, append_note
from piecework.foundation.target import Target
from piecework.foundation.torch_private import operator_of
from piecework.providers.libraries import KERNELS, Kernel
from piecework.spec.compile_options import BackendName, CompileOptions


@dataclass(frozen=True)
class KernelJob:
    """A kernel to build for some element types."""

    kernel: Kernel
    dtypes: tuple[str, ...]

    def key(self, target: Target) -> str:
        """Return the key of its artifact: everything that the library depends on."""
        sources = {path.name: digest_file(path) for path in self.kernel.sources}
        content = {
            "kernel": self.kernel.name,
            "dtypes": self.dtypes,
            "sources": sources,
            "flags": KERNEL_FLAGS,
            "format": FORMAT,
        }
        return digest_json({**content, "isa": target.fact, "machine": target.machine, "system": target.system})


def kernel_jobs(
    steps: Iterable[Step], *, options: CompileOptions, target: Target, device: str
) -> tuple[KernelJob, ...]:
    """Return the kernels that the opaque calls among `steps` can use."""
    if device != "cpu" or target.system != "linux" or options.backend is not BackendName.AOTI:
        return ()
    called: dict[str, set[str]] = {}
    for step in steps:
        if isinstance(step, OpaqueCall):
            operator = operator_of(step.node.target)
            if operator is not None:
                called.setdefault(operator.name, set()).add(_dtype(step))
    jobs = []
    for kernel in KERNELS:
        wanted = set[str]().union(*(called.get(operator, ()) for operator in kernel.operators))
        dtypes = tuple(d for d in kernel.dtypes if d in wanted)
        if dtypes:
            jobs.append(KernelJob(kernel, dtypes))
    return tuple(jobs)


def _dtype(call: OpaqueCall) -> str:
    """Return the element type of a call's first argument, "" where that is no tensor."""
    first: Any = call.node.args[0] if call.node.args else None
    value = first.meta.get("val") if hasattr(first, "meta") else None
    return str(getattr(value, "dtype", "")).removeprefix("torch.")


@final
@dataclass
class KernelBuilds:
    """Kernels that are being built in a thread, from `start_kernels` on; closing the backend ends it early."""

    jobs: tuple[KernelJob, ...]
    setup: CompileSetup
    _made: dict[str, Artifact] = field(default_factory=dict)
    _errors: list[Exception] = field(default_factory=list)
    _thread: threading.Thread | None = None
    _flight: Flight | None = None

    def start(self) -> None:
        """Look the kernels up, and start to build those that are missing."""
        missing = {job.key(self.setup.target): job for job in self.jobs if not self._find(job)}
        if missing:
            self._flight = Flight(self.setup.store.lease, overtake_s=self.setup.overtake_s)
            self._thread = threading.Thread(target=self._build, args=(missing, self._flight), daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Wait for no other process any more; a compiler that runs is ended by closing the backend."""
        if self._flight is not None:
            self._flight.end()

    def finish(self) -> Mapping[str, Artifact]:
        """Return the artifacts by their kernel's name, when they are there. Raises StoreError."""
        if self._thread is not None:
            self._thread.join()
        for error in self._errors:
            if not isinstance(error, CompileError):
                raise error
            self.setup.recorder.note(f"no native kernel, plain torch instead: {error.found}")
        self.setup.recorder.count("kernels", by=len(self._made))
        return self._made

    def facts(self) -> tuple[Fact, ...]:
        """Return the facts of the sources that were built."""
        return source_facts(path for job in self.jobs if job.kernel.name in self._made for path in job.kernel.sources)

    def _find(self, job: KernelJob) -> bool:
        found = find_artifact(self.setup.store, job.key(self.setup.target), report=self.setup.recorder.note)
        if found is not None:
            self._made[job.kernel.name] = found
        return found is not None

    def _build(self, jobs: Mapping[str, KernelJob], flight: Flight) -> None:
        try:
            with flight:
                for led in flight.rounds(jobs, is_made=lambda key: self._find(jobs[key])):
                    for key in led:
                        self._build_one(key, jobs[key])
                        flight.landed(key)
        except Exception as error:  # noqa: BLE001  told by `finish`, in the thread that asks
            self._errors.append(error)

    def _build_one(self, key: str, job: KernelJob) -> None:
        try:
            library = self.setup.backend.build_kernel(job.kernel.main, macros=_macros(job))
            if library is not None:
                append_note(library, canonical_json({"kernel": job.kernel.name}).decode(), mark=INTERFACE)
                self._made[job.kernel.name] = self.setup.store.put_artifact(key, content=library)
        except CompileError as error:
            self._errors.append(error)


def _macros(job: KernelJob) -> tuple[str, ...]:
    return tuple(f"PIECEWORK_{dtype.upper()}" for dtype in job.dtypes)
