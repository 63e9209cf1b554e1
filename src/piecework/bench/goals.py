"""What the figures are held against: limits on single figures, and on ratios of figures of the same run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
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
_VLLM: Final = "vllm"
_THROUGHPUT_TO_VLLM: Final = 1.0
_THROUGHPUT_AIM: Final = 1.2
_ONE_REQUEST_TO_VLLM: Final = 1.2
_FIRST_TOKEN_TO_VLLM: Final = 0.2
_EXPOSED: Final = "exposed"
_OPAQUE: Final = "opaque"
_EXPOSED_TO_OPAQUE: Final = 1.0
_DECODE_TO_OPAQUE: Final = 1.05
_TTFT_TO_OPAQUE: Final = 1.0
_RATES: Final = ("tok_s", "output_throughput", "output_tok_s")
_FIRST_TOKENS: Final = ("mean_ttft_ms", "median_ttft_ms")


class Bound(Enum):
    """Which side of its limit a value shall be on."""

    AT_MOST = "≤"
    AT_LEAST = "≥"


@dataclass(frozen=True)
class Goal:
    """A goal for the row of `key`: `text` says what is held against `limit`, `value` is what it is.

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

    def to_json(self) -> dict[str, object]:
        """Return the goal as a JSON object."""
        key = self.key
        return {
            "goal": self.text,
            "layers": key.layers,
            **key.details(),
            "value": round(self.value, 4),
            "bound": self.bound.name.lower(),
            "limit": self.limit,
            "met": self.met,
            **({} if self.aim is None else {"aim": self.aim, "aim_met": self._reaches(self.aim)}),
        }

    def __str__(self) -> str:
        text = f"{self.text} = {self.value:.3g} ({self.bound.value} {self.limit:g}: {'met' if self.met else 'MISSED'}"
        if self.aim is not None:
            text += f"; aim {self.aim:g}: {'met' if self._reaches(self.aim) else 'missed'}"
        return text + ")"


def check_goals(rows: Iterable[Row]) -> tuple[Goal, ...]:
    """Return the goals that the rows have figures for. Those about many layers are held at the most of the run."""
    known = {row.key: row.value for row in rows}
    ours = [key for key in known if key.system == _OURS]
    layers = sorted({key.layers for key in ours})
    return tuple(goal for key in ours for goal in _goals_of(key, known, layers))


def check_throughput_goals(rows: Iterable[Row]) -> tuple[Goal, ...]:
    """Return the goals of `bench throughput`, each a ratio to vLLM's figure of the same run."""
    known = {row.key: row.value for row in rows}
    made = []
    for key, value in known.items():
        peer = known.get(replace(key, system=_VLLM))
        if key.system != _OURS or not peer:
            continue
        text, ratio = f"{key.metric} ÷ {_VLLM}'s", value / peer
        match key.metric:
            case "output_tok_s":
                made.append(Goal(key, text, ratio, _THROUGHPUT_TO_VLLM, Bound.AT_LEAST, aim=_THROUGHPUT_AIM))
            case "one_request_tok_s":
                made.append(Goal(key, text, ratio, _ONE_REQUEST_TO_VLLM, Bound.AT_LEAST))
            case "first_token_s":
                made.append(Goal(key, text, ratio, _FIRST_TOKEN_TO_VLLM))
    return tuple(made)


def check_mla_goals(rows: Iterable[Row]) -> tuple[Goal, ...]:
    """Return the goals of `bench mla`: ratios of the exposed form's figures to the others' of the same run."""
    known = {row.key: row.value for row in rows}
    made = []
    for key, value in known.items():
        opaque, vllm = (known.get(replace(key, system=system)) for system in (_OPAQUE, _VLLM))
        if key.system != _EXPOSED:
            continue
        if opaque:
            text, ratio = f"{key.metric} ÷ {_OPAQUE}'s", value / opaque
            if key.metric in _RATES:
                least = _DECODE_TO_OPAQUE if key.regime == "decode" else _EXPOSED_TO_OPAQUE
                made.append(Goal(key, text, ratio, least, Bound.AT_LEAST))
            elif key.metric in _FIRST_TOKENS:
                made.append(Goal(key, text, ratio, _TTFT_TO_OPAQUE))
        if vllm and key.metric in {"output_tok_s", "output_throughput"}:
            text = f"{key.metric} ÷ {_VLLM}'s"
            made.append(Goal(key, text, value / vllm, _THROUGHPUT_TO_VLLM, Bound.AT_LEAST, aim=_THROUGHPUT_AIM))
    return tuple(made)


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
