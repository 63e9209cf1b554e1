"""A figure as a PNG, drawn by matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine

from piecework.bench.plots.figure import COLORS, BarPanel, Figure, LinePanel, number, ticks

_COLUMNS: Final = 2
_PANEL_INCHES: Final = (5.6, 3.2)
_DPI: Final = 130
_QUIET: Final = "#667085"


def write_png(figure: Figure, path: Path) -> None:
    """Write the picture. Raises OSError."""
    columns = min(_COLUMNS, max(1, len(figure.panels)))
    rows = math.ceil(len(figure.panels) / columns)
    width, height = _PANEL_INCHES
    foot = 0.25 * len(figure.remarks) + 0.15
    total = rows * height + 0.9 + foot
    rect = (0.01, foot / total, 0.98, 1 - (0.9 + foot) / total)
    layout = ConstrainedLayoutEngine(h_pad=0.12, rect=rect)
    canvas = Canvas(figsize=(columns * width, total), layout=layout)
    FigureCanvasAgg(canvas)
    canvas.text(0.02, 1 - 0.18 / total, figure.title, fontsize=15, weight="bold", va="top")
    canvas.text(0.02, 1 - 0.5 / total, figure.subtitle, fontsize=10, color=_QUIET, va="top")
    for line, remark in enumerate(figure.remarks):
        canvas.text(0.02, (foot - 0.05 - 0.25 * line) / total, remark, fontsize=8.5, color=_QUIET, va="top")
    for place, panel in enumerate(figure.panels):
        axes = canvas.add_subplot(rows, columns, place + 1)
        axes.set_title(panel.title, loc="left", fontsize=11, weight="bold")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if isinstance(panel, BarPanel):
            _bars(axes, panel)
        else:
            _lines(axes, panel)
    canvas.savefig(path, format="png", dpi=_DPI)


def _bars(axes: Any, panel: BarPanel) -> None:
    places = range(len(panel.bars))
    values = [bar.value for bar in panel.bars]
    spread = [[b.value - b.low for b in panel.bars], [b.high - b.value for b in panel.bars]]
    colors = [COLORS[bar.color % len(COLORS)] for bar in panel.bars]
    axes.barh(places, values, height=0.6, color=colors, xerr=spread, error_kw={"lw": 1.2, "capsize": 3})
    most = max((bar.high for bar in panel.bars), default=0.0) or 1.0
    for place, bar in enumerate(panel.bars):
        text = f"{number(bar.value)} {panel.unit}"
        axes.text(max(bar.value, bar.high) + 0.02 * most, place, text, va="center", fontsize=10, weight="bold")
    axes.set_yticks(places, [bar.label for bar in panel.bars])
    axes.set_ylim(max(len(panel.bars), 2) - 0.4, -0.6)
    axes.set_xlim(0, 1.35 * most)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    if panel.note:
        axes.set_xlabel(panel.note, fontsize=9, color=_QUIET, loc="left")


def _lines(axes: Any, panel: LinePanel) -> None:
    for line in panel.lines:
        xs, ys = zip(*line.points, strict=True) if line.points else ((), ())
        axes.plot(xs, ys, color=COLORS[line.color % len(COLORS)], lw=1.8, label=line.label)
    for setting, limit, coordinate in ((axes.set_xticks, axes.set_xlim, 0), (axes.set_yticks, axes.set_ylim, 1)):
        at = ticks(max((point[coordinate] for line in panel.lines for point in line.points), default=0.0))
        setting(at, [number(value) for value in at])
        limit(0, at[-1] * 1.02)
    axes.grid(color="#e3e7ee")
    axes.set_axisbelow(True)
    axes.set_xlabel(panel.x_label, fontsize=9.5, color=_QUIET)
    axes.set_ylabel(panel.y_label, fontsize=9.5, color=_QUIET)
    axes.tick_params(labelsize=9)
    if len(panel.lines) > 1:
        axes.legend(frameon=False, fontsize=9)
