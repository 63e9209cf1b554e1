"""What happened during a compile, a load or a generation: seconds per phase, counts, and remarks.

A `Recorder` is made by whoever wants to know and passed down; `Recorder.finish` turns it into a `Record`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

from piecework.errors import InternalError


@dataclass(frozen=True)
class Record:
    """What happened.

    Args:
        phases: seconds per named phase, in the order in which they first ended; "compile/lower" is part of "compile".
        counts: how many of what, such as "pieces" or "store_hits".
        notes: remarks for people, in order.
    """

    phases: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the record as a JSON object; seconds to the microsecond."""
        return {
            "phases": {name: round(seconds, 6) for name, seconds in self.phases.items()},
            "counts": dict(self.counts),
            "notes": list(self.notes),
        }

    @staticmethod
    def from_json(value: object) -> Record:
        """Return the record that `to_json` wrote; raises ValueError for anything else."""
        if not isinstance(value, dict) or not set(value) <= {"phases", "counts", "notes"}:
            raise ValueError("a record is an object with phases, counts and notes")
        phases, counts, notes = value.get("phases", {}), value.get("counts", {}), value.get("notes", [])
        if not isinstance(phases, dict) or not all(_is_number(seconds) for seconds in phases.values()):
            raise ValueError("a record's phases are numbers of seconds")
        if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
            raise ValueError("a record's counts are whole numbers")
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise ValueError("a record's notes are strings")
        return Record(phases={name: float(s) for name, s in phases.items()}, counts=dict(counts), notes=tuple(notes))


@final
class Recorder:
    """Collects what happens; may be shared between threads.

    Args:
        clock: gives seconds that only increase.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._mutex = threading.Lock()
        self._phases: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._notes: list[str] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to a phase, also when it ends with an exception."""
        start = self._clock()
        try:
            yield
        finally:
            self.add_seconds(name, seconds=self._clock() - start)

    def add_seconds(self, name: str, *, seconds: float) -> None:
        """Add seconds that were measured elsewhere to a phase."""
        with self._mutex:
            self._phases[name] = self._phases.get(name, 0.0) + seconds

    def count(self, name: str, *, by: int = 1) -> None:
        """Add to a count."""
        with self._mutex:
            self._counts[name] = self._counts.get(name, 0) + by

    def note(self, text: str) -> None:
        """Add a remark for people."""
        with self._mutex:
            self._notes.append(text)

    def add(self, record: Record, *, prefix: str = "") -> None:
        """Add what another part (a worker process, say) recorded, its phases and counts under `prefix`."""
        if prefix and not prefix.endswith("/"):
            raise InternalError(f"a prefix of phases ends with a slash: {prefix!r}")
        for name, seconds in record.phases.items():
            self.add_seconds(prefix + name, seconds=seconds)
        for name, count in record.counts.items():
            self.count(prefix + name, by=count)
        for text in record.notes:
            self.note(text)

    def finish(self) -> Record:
        """Return what was collected so far."""
        with self._mutex:
            return Record(phases=dict(self._phases), counts=dict(self._counts), notes=tuple(self._notes))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
