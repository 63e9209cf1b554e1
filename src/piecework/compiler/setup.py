"""What a compile works with, as one value: options, backend, store, target, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from piecework.bundle.record import Recorder
from piecework.bundle.store.interface import Store
from piecework.compiler.backends.backend import Backend
from piecework.foundation.flight import OVERTAKE_S
from piecework.foundation.target import Target
from piecework.spec.compile_options import CompileOptions

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how many artifacts are done, and how many there are (0: not known yet)."""


def unheard(_text: str, _done: int, _total: int) -> None:
    """Let progress go unsaid."""


@dataclass(frozen=True)
class CompileSetup:
    """What a compile works with.

    Attributes:
        options: how to compile.
        backend: makes the artifacts.
        store: artifacts that are there already are not compiled again; new ones are put there.
        target: the CPU that the artifacts run on.
        recorder: is told phases ("capture", "split", "compile", "plan"), counts and notes.
        on_progress: is told what is done.
        overtake_s: how long to wait for another process that makes no progress with what is needed here, in seconds.
    """

    options: CompileOptions
    backend: Backend
    store: Store
    target: Target
    recorder: Recorder = field(default_factory=Recorder)
    on_progress: OnProgress = unheard
    overtake_s: float = OVERTAKE_S
