"""What a start of an engine reports while it goes on, to whatever shows it. Needs no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from piecework.engine.compile_process import CompileProcess, CompileStep
from piecework.foundation.process import seconds_since_start


@dataclass(frozen=True)
class Phase:
    """A part of the start: from when to when, in seconds since the process began; `end_s` None while it goes on."""

    name: str
    begin_s: float
    end_s: float | None = None


@dataclass(frozen=True)
class Note:
    """A remark for people, such as that a bundle was set aside, or where a profile was written."""

    text: str


@dataclass(frozen=True)
class BundleMissing:
    """The store has no bundle that fits, and why; one is compiled now."""

    reason: str


@dataclass(frozen=True)
class CompileBegins:
    """A compile begins. Another thread may stop its process, also before it runs.

    Attributes:
        process: the compile.
        backend: "aoti" or "eager".
        reason: why there was no bundle to use.
    """

    process: CompileProcess
    backend: str
    reason: str


@dataclass(frozen=True)
class CompileGoesOn:
    """What a compile is doing."""

    backend: str
    step: CompileStep


@dataclass(frozen=True)
class CompileEnds:
    """A compile is over, well or not; `last` where no other one follows."""

    backend: str
    last: bool


StartEvent: TypeAlias = Phase | Note | BundleMissing | CompileBegins | CompileGoesOn | CompileEnds
OnEvent: TypeAlias = Callable[[StartEvent], None]


def notes_to(on_note: Callable[[str], None]) -> OnEvent:
    """Return what hears a start's events and passes on only what people are told: remarks, and that one compiles."""

    def hear(event: StartEvent) -> None:
        match event:
            case Note(text):
                on_note(text)
            case BundleMissing(reason):
                on_note(f"{reason}: compiling one")

    return hear


@contextlib.contextmanager
def phase(name: str, *, on_event: OnEvent) -> Iterator[None]:
    """Report when the block begins and ends, also when it ends with an exception."""
    begin = seconds_since_start()
    on_event(Phase(name, begin))
    try:
        yield
    finally:
        on_event(Phase(name, begin, seconds_since_start()))
