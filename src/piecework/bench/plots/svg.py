"""Draw a panel as SVG. Colours of text and axes are the page's, so that it may be light or dark."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Final

from piecework.bench.plots.figure import COLORS, Bar, BarPanel, LinePanel, Panel, number, ticks

WIDTH: Final = 460
_BAR: Final = 26
_GAP: Final = 12
_LABELS: Final = 92
_VALUES: Final = 120
_PLOT_HEIGHT: Final = 220
_LEFT, _RIGHT, _BOTTOM, _TOP = 68, 14, 42, 12


def draw(panel: Panel) -> str:
    """Return an <svg> element."""
    height, parts = _bars(panel) if isinstance(panel, BarPanel) else _lines(panel)
    head = f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img"'
    return f'{head} aria-label="{escape(panel.title)}">{"".join(parts)}</svg>'


def _bars(panel: BarPanel) -> tuple[int, Iterator[str]]:
    height = len(panel.bars) * (_BAR + _GAP) + _GAP
    most = max((bar.high for bar in panel.bars), default=0.0) or 1.0
    scale = (WIDTH - _LABELS - _VALUES) / most
    return height, (part for row, bar in enumerate(panel.bars) for part in _bar(bar, row, panel.unit, scale))


def _bar(bar: Bar, row: int, unit: str, scale: float) -> Iterator[str]:
    top = _GAP + row * (_BAR + _GAP)
    middle = top + _BAR / 2
    yield _text(_LABELS - 8, middle, bar.label, anchor="end")
    color = COLORS[bar.color % len(COLORS)]
    width = max(1.0, bar.value * scale)
    yield f'<rect x="{_LABELS}" y="{top}" width="{width:.1f}" height="{_BAR}" rx="2" fill="{color}"/>'
    if bar.high > bar.low:
        low, high = (f"{_LABELS + end * scale:.1f}" for end in (bar.low, bar.high))
        yield f'<path class="spread" d="M{low} {middle}H{high}M{low} {middle - 5}v10M{high} {middle - 5}v10"/>'
    end = _LABELS + max(bar.value, bar.high) * scale + 7
    yield _text(end, middle, f"{number(bar.value)} {unit}", css="value")


def _lines(panel: LinePanel) -> tuple[int, Iterator[str]]:
    return _TOP + _PLOT_HEIGHT + _BOTTOM, _line_parts(panel)


def _line_parts(panel: LinePanel) -> Iterator[str]:
    xs = ticks(max((x for line in panel.lines for x, _ in line.points), default=0.0))
    ys = ticks(max((y for line in panel.lines for _, y in line.points), default=0.0))
    width = WIDTH - _LEFT - _RIGHT
    bottom = _TOP + _PLOT_HEIGHT

    def at_x(value: float) -> float:
        return _LEFT + width * value / xs[-1]

    def at_y(value: float) -> float:
        return bottom - _PLOT_HEIGHT * value / ys[-1]

    for y in ys:
        yield f'<path class="grid" d="M{_LEFT} {at_y(y):.1f}H{WIDTH - _RIGHT}"/>'
        yield _text(_LEFT - 7, at_y(y), number(y), anchor="end", css="tick")
    for x in xs:
        yield f'<path class="grid" d="M{at_x(x):.1f} {_TOP}V{bottom}"/>'
        yield _text(at_x(x), bottom + 13, number(x), anchor="middle", css="tick")
    yield _text(_LEFT + width / 2, bottom + 32, panel.x_label, anchor="middle", css="axis")
    middle = _TOP + _PLOT_HEIGHT / 2
    yield f'<g transform="rotate(-90 12 {middle})">{_text(12, middle, panel.y_label, anchor="middle", css="axis")}</g>'
    for line in panel.lines:
        points = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in line.points)
        if points:
            color = COLORS[line.color % len(COLORS)]
            yield f'<path fill="none" stroke="{color}" stroke-width="2" stroke-linejoin="round" d="M{points}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", css: str = "label") -> str:
    return (
        f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" dominant-baseline="central">'
        f"{escape(text)}</text>"
    )
