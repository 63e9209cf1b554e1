"""Samples and what becomes of them: one row per system, model and metric, with the median and the spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

_UNITS: Final = {
    "request_throughput": "requests/s",
    "output_throughput": "tokens/s",
    "tok_s": "tokens/s",
    "_s": "s",
    "_ms": "ms",
    "_us": "µs",
    "_mb": "MiB",
}

OnProgress = Callable[[str, int, int], None]
"""Called with what is being measured, how many processes are done, and how many there are (0 where nobody knows)."""


@dataclass(frozen=True)
class Key:
    """What was measured: a metric of a system and a model; the rest where it applies.

    Attributes:
        regime, batch, context: of forwards: which tokens they have ("decode", "prefill", "mixed"), how many sequences,
            and how many tokens each of those had in the cache before.
    """

    system: str
    layers: int
    metric: str
    dtype: str | None = None
    batch: int | None = None
    regime: str | None = None
    context: int | None = None

    def details(self) -> dict[str, object]:
        """Return what applies beside system, layers and metric, by name."""
        given = {"dtype": self.dtype, "regime": self.regime, "batch": self.batch, "context": self.context}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def unit(self) -> str:
        """The metric's unit, which its name ends with; "" for counts."""
        return next((unit for ending, unit in _UNITS.items() if self.metric.endswith(ending)), "")


@dataclass(frozen=True)
class Sample:
    """One measured value, in its key's unit; `note` says what exactly it is."""

    key: Key
    value: float
    note: str = ""


@dataclass(frozen=True)
class Row:
    """The samples of one key: their median, number and extremes."""

    key: Key
    value: float
    n: int
    min: float
    max: float
    note: str = ""

    def to_json(self) -> dict[str, object]:
        """Return the row as a JSON object; what doesn't apply is left out."""
        key = self.key
        row: dict[str, object] = {"system": key.system, "layers": key.layers, "metric": key.metric, **key.details()}
        row |= {"value": _rounded(self.value), "unit": key.unit, "n": self.n}
        row |= {"min": _rounded(self.min), "max": _rounded(self.max)}
        return row | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class Measured:
    """The rows, what is remarkable about them, and the names of systems of which a cell failed."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    failed: frozenset[str]


def summarise(samples: Iterable[Sample]) -> tuple[Row, ...]:
    """Return a row per key, in the order in which the keys first appear; the last note of a key stays."""
    groups: dict[Key, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.key, []).append(sample)
    rows = []
    for key, group in groups.items():
        values = [sample.value for sample in group]
        rows.append(Row(key, statistics.median(values), len(values), min(values), max(values), group[-1].note))
    return tuple(rows)


def _rounded(value: float) -> float:
    """Return whole numbers as such, and others with as many digits as mean something."""
    if value == int(value):
        return int(value)
    return round(value, 3 if abs(value) >= 1 else 5)
