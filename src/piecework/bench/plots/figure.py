"""What a picture shows, apart from how it is drawn: panels of bars and of lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

COLORS: Final = ("#2f6fde", "#e08a1e", "#2a9d74", "#b04fc4")
_STEPS: Final = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Bar:
    """One value, with the least and the greatest that were measured; `color` counts in COLORS."""

    label: str
    value: float
    low: float
    high: float
    color: int = 0


@dataclass(frozen=True)
class BarPanel:
    """Bars of the same unit below each other. `note` stands under them."""

    title: str
    unit: str
    bars: tuple[Bar, ...]
    note: str = ""


@dataclass(frozen=True)
class Line:
    """Points (x, y) that are connected."""

    label: str
    points: tuple[tuple[float, float], ...]
    color: int = 0


@dataclass(frozen=True)
class LinePanel:
    """Lines over the same axes, which both begin at 0."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]


Panel = BarPanel | LinePanel


@dataclass(frozen=True)
class Figure:
    """Panels under a title; `remarks` are lines at the end, such as what was measured on."""

    title: str
    subtitle: str
    panels: tuple[Panel, ...]
    remarks: tuple[str, ...] = ()


def ticks(greatest: float, *, most: int = 6) -> list[float]:
    """Return round numbers from 0 to `greatest` or a little more, at most so many and 2 at least."""
    if not (greatest > 0 and math.isfinite(greatest)):
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(greatest / (most - 1)))
    step = next(power * factor for factor in _STEPS if power * factor * (most - 1) >= greatest * (1 - 1e-9))
    count = math.ceil(greatest / step - 1e-9)
    return [step * number for number in range(count + 1)]


def number(value: float) -> str:
    """Write a number with three or four digits that mean something."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"


def cumulative(values: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Return the points of the share (in %) of values that are at most x, as a line with steps; at most some 400."""
    ordered = sorted(values)
    count = len(ordered)
    stride = max(1, count // 200)
    points: list[tuple[float, float]] = []
    share = 0.0
    for index in sorted({*range(0, count, stride), count - 1}) if count else []:
        points += [(ordered[index], share), (ordered[index], share := 100 * (index + 1) / count)]
    return tuple(points)
