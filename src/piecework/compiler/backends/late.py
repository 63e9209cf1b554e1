"""A backend that starts nothing before there is something to compile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, final

from piecework.bundle.store.interface import Store
from piecework.compiler.backends.backend import AotiBackend, Backend, OnEvent, OnMade
from piecework.compiler.backends.toolchain import find_toolchain
from piecework.errors import ShapeContractError
from piecework.foundation.environment import read_environment
from piecework.foundation.target import Target

if TYPE_CHECKING:
    from piecework.compiler.job import Job  # it imports torch


@final
class LateBackend(Backend):
    """AOTInductor, whose processes start when there is something to compile.

    Args:
        store: gives the scratch directory.
        root: directory for what the C++ compiler prepares once per machine.
        target: the CPU.
        device: device type of the pieces.
    """

    def __init__(self, store: Store, *, root: Path, target: Target, device: str) -> None:
        self.device = device
        self._store = store
        self._root = root
        self._target = target
        self._stack = contextlib.ExitStack()
        self._backend: Backend | None = None
        self._mutex = threading.Lock()

    def compile(
        self, jobs: Mapping[str, Job], *, on_event: OnEvent, on_made: OnMade
    ) -> Mapping[str, ShapeContractError]:
        """See `Backend.compile`."""
        return self._started().compile(jobs, on_event=on_event, on_made=on_made)

    def build_kernel(self, source: Path, *, macros: tuple[str, ...]) -> Path | None:
        """See `Backend.build_kernel`."""
        return self._started().build_kernel(source, macros=macros)

    def close(self) -> None:
        """See `Backend.close`."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        self._stack.close()

    def _started(self) -> Backend:
        with self._mutex:
            if self._backend is None:
                environment = read_environment()
                self._backend = AotiBackend(
                    find_toolchain(self._root, compiler=environment.compiler, overtake_s=environment.overtake_s),
                    scratch=self._stack.enter_context(self._store.scratch()),
                    target=self._target,
                    device=self.device,
                )
            return self._backend
