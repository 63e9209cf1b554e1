"""What the figures are held against: limits on single figures, and on ratios of figures of the same run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from piecework.bench.measurements import Key, Row

_OURS: Final = "piecework"
_COLD_GROWTH: Final = 1.15
_COLD_TO_VLLM: Final = 0.3
_COLD_TO_TORCH: Final = 0.5
_LOAD_MS: Final = 60.0
_FIRST_TOKEN_S: Final = 3.0
_OVER_IMPORT_S: Final = 0.7
_STEP_TO_TORCH: Final = 1.0
_BUNDLE_GROWTH: Final = 1.1
_RSS_MB: Final = 60.0


@dataclass(frozen=True)
class Goal:
    """A goal for the row of `key`: `text` says what is held against `limit`, `value` is what it is."""

    key: Key
    text: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether the value is within the limit."""
        return self.value <= self.limit

    def to_json(self) -> dict[str, object]:
        """Return the goal as a JSON object."""
        key = self.key
        where = {"layers": key.layers, "dtype": key.dtype, "batch": key.batch}
        return {
            "goal": self.text,
            **{name: value for name, value in where.items() if value is not None},
            "value": round(self.value, 4),
            "limit": self.limit,
            "met": self.met,
        }

    def __str__(self) -> str:
        return f"{self.text} = {self.value:.3g} (≤ {self.limit:g}: {'met' if self.met else 'MISSED'})"


def check_goals(rows: Iterable[Row]) -> tuple[Goal, ...]:
    """Return the goals that the rows have figures for. Those about many layers are held at the most of the run."""
    known = {row.key: row.value for row in rows}
    ours = [key for key in known if key.system == _OURS]
    layers = sorted({key.layers for key in ours})
    return tuple(goal for key in ours for goal in _goals_of(key, known, layers))


def _goals_of(key: Key, known: Mapping[Key, float], layers: Sequence[int]) -> Iterator[Goal]:
    """Yield the goals for one of our rows."""
    value = known[key]
    few = replace(key, layers=layers[0])
    many = key.layers == layers[-1]
    if key.metric == "step_ms":
        yield from _ratio(key, known, replace(key, system="torch_compile"), _STEP_TO_TORCH)
    if not many:
        return
    match key.metric:
        case "cold_s":
            yield from _ratio(key, known, few, _COLD_GROWTH)
            yield from _ratio(key, known, replace(key, system="vllm"), _COLD_TO_VLLM)
            yield from _ratio(key, known, replace(key, system="torch_compile"), _COLD_TO_TORCH)
        case "bundle_mb":
            yield from _ratio(key, known, few, _BUNDLE_GROWTH)
        case "unique_pieces":
            yield from _ratio(key, known, few, 1.0)
        case "load_ms":
            yield Goal(key, "load_ms", value, _LOAD_MS)
        case "rss_mb":
            yield Goal(key, "rss_mb", value, _RSS_MB)
        case "first_token_s":
            yield Goal(key, "first_token_s", value, _FIRST_TOKEN_S)
            importing = known.get(replace(key, metric="import_torch_s"))
            if importing is not None:
                yield Goal(key, "first_token_s − import_torch_s", value - importing, _OVER_IMPORT_S)


def _ratio(key: Key, known: Mapping[Key, float], other: Key, limit: float) -> Iterator[Goal]:
    """Yield the goal for a row's ratio to another row, where that is there and another one."""
    if other != key and known.get(other):
        beside = f"that at {other.layers} layers" if other.layers != key.layers else f"{other.system}'s"
        yield Goal(key, f"{key.metric} ÷ {beside}", known[key] / known[other], limit)
