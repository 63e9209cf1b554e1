"""A picture of a benchmark's figures, by matplotlib: a panel of bars per metric, one bar per row.

matplotlib, because its pictures go into documents as they are; it is a package of the `dev` extra.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.common.run import Goal

COLORS: Final = ("#2f6fde", "#e08a1e", "#2a9d74", "#b04fc4", "#c0392b")
_TITLE: Final = ("metric", "op", "model", "dtype", "regime")  # what a panel's rows have in common
_NOT_KEY: Final = ("value", "unit", "n", "min", "max", "note", "system")
_COLUMNS: Final = 2
_WIDTH: Final = 5.6  # inches of a panel
_DPI: Final = 130
_QUIET: Final = "#667085"

Row = Mapping[str, Any]


def draw(report: Mapping[str, Any], goals: Sequence[Goal], *, path: Path) -> None:
    """Write a picture of what `--out` writes, in the format that the path's ending names."""
    found = panels(report["rows"])
    systems = list(dict.fromkeys(row["system"] for row in report["rows"]))
    columns = min(_COLUMNS, max(1, len(found)))
    lines = math.ceil(len(found) / columns)
    most = max((len(rows) for rows in found.values()), default=1)
    height = lines * (1.2 + 0.32 * most) + 0.6
    figure = Figure(
        figsize=(columns * _WIDTH, height), layout=ConstrainedLayoutEngine(rect=(0, 0.4 / height, 1, 1 - 0.5 / height))
    )
    FigureCanvasAgg(figure)
    for remark, place in ((report["machine"], 0.22), ({**report["versions"], "commit": report["commit"]}, 0.06)):
        text = ", ".join(f"{name} {value}" for name, value in remark.items())
        figure.text(0.02, place / height, text, fontsize=7.5, color=_QUIET)
    for place, (title, rows) in enumerate(found.items()):
        axes = figure.add_subplot(lines, columns, place + 1)
        axes.set_title(title, loc="left", fontsize=11, weight="bold")
        held = [str(goal) for goal in goals if any(goal.key.items() <= row.items() for row in rows)]
        _bars(axes, rows, systems=systems, note="\n".join(held))
    figure.savefig(path, dpi=_DPI)


def panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each panel, by its title."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(", ".join(str(row[name]) for name in _TITLE if name in row), []).append(row)
    return found


def label(row: Row, beside: Sequence[Row]) -> str:
    """Return a bar's label: the system, and what tells the row from others of its panel."""
    apart = [name for name in row if name not in _NOT_KEY and len({each.get(name) for each in beside}) > 1]
    return ", ".join([row["system"], *(f"{name} {row[name]}" for name in apart)])


def _bars(axes: Any, rows: Sequence[Row], *, systems: Sequence[str], note: str) -> None:
    values, lows, highs = ([row[name] for row in rows] for name in ("value", "min", "max"))
    spread = [
        [v - low for v, low in zip(values, lows, strict=True)],
        [h - v for v, h in zip(values, highs, strict=True)],
    ]
    colors = [COLORS[systems.index(row["system"]) % len(COLORS)] for row in rows]
    axes.barh(range(len(rows)), values, height=0.6, color=colors, xerr=spread, error_kw={"lw": 1.2, "capsize": 3})
    most = max(highs) or 1.0
    for place, row in enumerate(rows):
        text = f"{row['value']:.4g} {row['unit']}"
        axes.text(highs[place] + 0.02 * most, place, text, va="center", fontsize=9, weight="bold")
    axes.set_yticks(range(len(rows)), [label(row, rows) for row in rows], fontsize=9)
    axes.set_ylim(max(len(rows), 2) - 0.4, -0.6)
    axes.set_xlim(0, 1.35 * most)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    if note:
        axes.set_xlabel(note, fontsize=8, color=_QUIET, loc="left")
