"""What a run of a benchmark has found so far: figures with their spread, goals and notes."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, final

from benchmarks.common.contention import NOTEWORTHY, read_cpu_times, share_of_others
from benchmarks.common.launch import CellError, Launcher

UNITS: Final = {
    "request_throughput": "requests/s",
    "output_throughput": "tokens/s",
    "tok_s": "tokens/s",
    "texts_s": "texts/s",
    "_s": "s",
    "_ms": "ms",
    "_us": "us",
    "_mb": "MiB",
}
Key = Mapping[str, Any]
"""What a figure is of: system and metric, and what else applies (layers, dtype, batch, tokens …), by name."""


class Bound(Enum):
    """Which side of its limit a value shall be on."""

    AT_MOST = "≤"
    AT_LEAST = "≥"


@dataclass(frozen=True)
class Goal:
    """A goal for the figure of `key`: `text` says what is held against `limit`, `value` is what it is.

    `aim` is a limit that would be better still.
    """

    key: Key
    text: str
    value: float
    limit: float
    bound: Bound = Bound.AT_MOST
    aim: float | None = None

    @property
    def met(self) -> bool:
        """Whether the value is within the limit."""
        return self._reaches(self.limit)

    def _reaches(self, limit: float) -> bool:
        return self.value <= limit if self.bound is Bound.AT_MOST else self.value >= limit

    def to_json(self) -> dict[str, Any]:
        """Return the goal as a JSON object."""
        made = {"goal": self.text, **self.key, "value": round(self.value, 4), "bound": self.bound.name.lower()}
        made |= {"limit": self.limit, "met": self.met}
        return made if self.aim is None else made | {"aim": self.aim, "aim_met": self._reaches(self.aim)}

    def __str__(self) -> str:
        text = f"{self.text} = {self.value:.3g} ({self.bound.value} {self.limit:g}: {'met' if self.met else 'MISSED'}"
        if self.aim is not None:
            text += f"; aim {self.aim:g}: {'met' if self._reaches(self.aim) else 'missed'}"
        return text + ")"


@final
class Run:
    """Collects what is measured.

    Attributes:
        root: a directory for what is written meanwhile; removed at the end.
        launcher: runs processes whose caches lie there.
        notes: what is remarkable.
        goals: what the figures are held against.
        failed: the systems of which a process failed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.launcher = Launcher(root)
        self.notes: list[str] = []
        self.goals: list[Goal] = []
        self.failed: set[str] = set()
        self._found: dict[frozenset[Any], _Figure] = {}
        self._broken: set[tuple[str, str]] = set()

    def add(self, *values: float, system: str, metric: str, note: str = "", **key: Any) -> None:
        """Add samples to a figure. What of `key` is None doesn't apply; the last note of a figure stays."""
        whole = {"system": system, **_given(key), "metric": metric}
        figure = self._found.setdefault(frozenset(whole.items()), _Figure(whole, [], note))
        figure.values.extend(values)
        figure.note = note or figure.note

    def find(self, **given: Any) -> list[Key]:
        """Return the keys of the figures that have all of `given`, in the order in which they first came."""
        wanted = given.items()
        return [figure.key for figure in self._found.values() if wanted <= figure.key.items()]

    def value(self, key: Key) -> float | None:
        """Return the median of a figure, or None where there is none."""
        figure = self._found.get(frozenset(_given(key).items()))
        return statistics.median(figure.values) if figure else None

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per figure: its key, the median, unit, number, least and greatest."""
        return [figure.row() for figure in self._found.values()]

    def hold(
        self, key: Key, text: str, value: float, limit: float, bound: Bound = Bound.AT_MOST, aim: float | None = None
    ) -> None:
        """Hold a value against a limit."""
        self.goals.append(Goal(key, text, value, limit, bound, aim))

    def compare(
        self, key: Key, limit: float, bound: Bound = Bound.AT_MOST, *, aim: float | None = None, **other: Any
    ) -> None:
        """Hold a figure's ratio to another one, `key` with `other` changed, against a limit, where both are there."""
        beside = {**key, **other}
        mine, theirs = self.value(key), self.value(beside)
        if beside == key or mine is None or not theirs:
            return
        who = (
            f"{other['system']}'s"
            if "system" in other
            else "that at " + ", ".join(f"{v} {n}" for n, v in other.items())
        )
        self.hold(key, f"{key['metric']} ÷ {who}", mine / theirs, limit, bound, aim)

    def progress(self, text: str) -> None:
        """Show what is being done."""
        print(text, file=sys.stderr, flush=True)

    def attempt(self, what: str, system: str, measure: Callable[[], object], *, case: str = "") -> None:
        """Measure a system, unless it failed before with the same case.

        What fails becomes a note, and so does that other processes kept the machine busy meanwhile.
        """
        if (system, case) in self._broken:
            return
        text = ", ".join(filter(None, (f"{what}: {system}", case)))
        self.progress(text)
        before = read_cpu_times()
        try:
            measure()
        except CellError as error:
            self._broken.add((system, case))
            self.failed.add(system)
            self.notes.append(f"{text} failed: {error.found}")
        others = share_of_others(before, read_cpu_times())
        if others >= NOTEWORTHY:
            self.notes.append(f"{text}: other processes took {others:.0%} of the machine meanwhile, so don't trust it")


@dataclass
class _Figure:
    """The samples of one key."""

    key: Key
    values: list[float]
    note: str

    def row(self) -> dict[str, Any]:
        metric = self.key["metric"]
        unit = next((unit for ending, unit in UNITS.items() if metric.endswith(ending)), "")
        made = {**self.key, "value": _rounded(statistics.median(self.values)), "unit": unit, "n": len(self.values)}
        made |= {"min": _rounded(min(self.values)), "max": _rounded(max(self.values))}
        return made | ({"note": self.note} if self.note else {})


def _given(key: Key) -> dict[str, Any]:
    return {name: value for name, value in key.items() if value is not None}


def _rounded(value: float) -> float:
    """Return whole numbers as such, and others with as many digits as mean something."""
    if value == int(value):
        return int(value)
    return round(value, 3 if abs(value) >= 1 else 5)
