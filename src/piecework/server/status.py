"""How far the server is: its state, the phases of its start, and a compile that is under way.

Written by the threads that start the server, read by the one that answers requests.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, final

from piecework.engine.events import Phase
from piecework.server.service import AnyService


class State(Enum):
    """What the server is doing. Only READY, and COMPILING with a service, answer requests for text."""

    STARTING = "starting"
    COMPILING = "compiling"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True)
class CompileProgress:
    """A compile in another process.

    Args:
        reason: why there was no bundle to use.
        backend: "eager" or "aoti".
        stage: what it is doing now.
        done, total: how many of how many pieces; 0 of 0 where that isn't known yet.
        begin_s: seconds since the process began.
    """

    reason: str
    backend: str
    stage: str = "starting"
    done: int = 0
    total: int = 0
    begin_s: float = 0.0


@dataclass(frozen=True)
class BundleUse:
    """The bundle that is running: whether the store had it, its backend, and what inspect shows of it."""

    hit: bool
    backend: str
    report: Callable[[], Mapping[str, Any]]


@final
class ServerStatus:
    """How far the server is.

    Args:
        clock: seconds since the process began.
    """

    def __init__(self, *, clock: Callable[[], float] | None = None) -> None:
        began = time.monotonic()
        self._clock = clock or (lambda: time.monotonic() - began)
        self._mutex = threading.Lock()
        self._state = State.STARTING
        self._phases: dict[str, Phase] = {}
        self._service: AnyService | None = None
        self._compile: CompileProgress | None = None
        self._bundle: BundleUse | None = None
        self._failure = ""
        self._first_token_s: float | None = None

    @property
    def state(self) -> State:
        """What the server is doing."""
        return State.FAILED if self.failure else self._state

    @property
    def service(self) -> AnyService | None:
        """What generates or encodes, or None while nothing can."""
        return self._service

    @property
    def bundle(self) -> BundleUse | None:
        """The bundle that is running, or None."""
        return self._bundle

    @property
    def compiling(self) -> CompileProgress | None:
        """The compile that is under way, or None."""
        return self._compile

    @property
    def serving(self) -> str | None:
        """The backend of the bundle that answers, or None."""
        with self._mutex:
            return self._bundle.backend if self._bundle is not None and self._service is not None else None

    @property
    def first_token_s(self) -> float | None:
        """When the first token of the process came, in seconds since it began, or None."""
        return self._first_token_s

    @property
    def failure(self) -> str:
        """Why the start failed, or what has ended the engine, or ""."""
        service = self._service
        return self._failure or ("" if service is None else service.failure)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the start, in the order in which they began."""
        with self._mutex:
            return tuple(sorted(self._phases.values(), key=lambda phase: phase.begin_s))

    @property
    def uptime_s(self) -> float:
        """Seconds since the process began."""
        return self._clock()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note when the block begins and ends, also when it ends with an exception."""
        begin = self._clock()
        self.note_phase(Phase(name, begin))
        try:
            yield
        finally:
            self.note_phase(Phase(name, begin, self._clock()))

    def note_phase(self, phase: Phase) -> None:
        """Add a phase, or replace the one of the same name."""
        with self._mutex:
            self._phases[phase.name] = phase

    def compile_begins(self, *, reason: str, backend: str) -> None:
        """Note that a compile was started, and why."""
        with self._mutex:
            self._compile = CompileProgress(reason, backend, begin_s=self._clock())
            if self._state is not State.DRAINING:
                self._state = State.COMPILING

    def compile_goes_on(self, stage: str, *, done: int = 0, total: int = 0) -> None:
        """Note what the compile is doing."""
        with self._mutex:
            if self._compile is not None:
                self._compile = replace(self._compile, stage=stage, done=done, total=total)

    def serves(self, service: AnyService, *, bundle: BundleUse) -> None:
        """Note that `service` answers from now on, with a bundle; a compile that goes on keeps its state."""
        with self._mutex:
            self._service = service
            self._bundle = bundle
            if self._state is State.STARTING or (self._state is State.COMPILING and self._compile is None):
                self._state = State.READY

    def compile_ends(self) -> None:
        """Note that no compile is under way any more."""
        with self._mutex:
            self._compile = None
            if self._state is State.COMPILING:
                self._state = State.READY if self._service is not None else State.STARTING

    def first_token(self) -> None:
        """Note the first token of the process."""
        if self._first_token_s is None:
            self._first_token_s = self._clock()

    def drains(self) -> None:
        """Note that no new request is taken."""
        with self._mutex:
            self._state = State.DRAINING

    def fails(self, failure: str) -> None:
        """Note that the server can't generate, and why."""
        with self._mutex:
            self._state = State.FAILED
            self._failure = failure
            self._service = None
