"""The figure of `bench mla`: both forms of latent attention beside each other, a panel per regime and per metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from piecework.bench.goals import Goal
from piecework.bench.measurements import Measured, Row
from piecework.bench.plots.figure import Bar, BarPanel, Figure
from piecework.bench.plots.throughput import remarks_of

_REGIMES: Final = {"decode": "Decode only", "prefill": "Prefill only", "mixed": "Decode and prefill"}
_TITLES: Final = {
    "output_throughput": "Chats all at once: generated tokens",
    "median_ttft_ms": "Time to first token, median (less is better)",
    "median_tpot_ms": "Time per output token, median (less is better)",
    "p99_itl_ms": "Inter-token latency, 99th percentile (less is better)",
    "output_tok_s": "Offline: generated tokens, batch",
    "one_request_tok_s": "Offline: generated tokens, one request alone",
}


def mla_figure(
    result: Measured, goals: Sequence[Goal], *, settings: Mapping[str, Any], about: Mapping[str, Any]
) -> Figure:
    """Return the figure of rows, with their notes, the goals that they are held against, and what was measured on."""
    rows = result.rows
    systems = list(dict.fromkeys(row.key.system for row in rows))
    panels = []
    for dtype in dict.fromkeys(row.key.dtype for row in rows):
        for regime, title in _REGIMES.items():
            found = [row for row in rows if (row.key.regime, row.key.dtype) == (regime, dtype)]
            panels += _panel(f"{title}, {dtype}: new tokens", found, goals, systems=systems)
    for metric, title in _TITLES.items():
        panels += _panel(title, [row for row in rows if row.key.metric == metric], goals, systems=systems)
    subtitle = "{layers} layers of hidden size {hidden} with {heads} heads, and {model} end to end in {dtype}"
    return Figure("Latent attention", subtitle.format(**settings), tuple(panels), (*result.notes, *remarks_of(about)))


def _panel(title: str, rows: Sequence[Row], goals: Sequence[Goal], *, systems: Sequence[str]) -> list[BarPanel]:
    """Return a panel of the rows, or none where there are none; systems stay together."""
    ordered = sorted(rows, key=lambda row: (row.key.batch or 0, row.key.context or 0))
    bars = tuple(Bar(_label(r), r.value, r.min, r.max, systems.index(r.key.system)) for r in ordered)
    note = "; ".join(str(goal) for row in ordered for goal in goals if goal.key == row.key)
    return [BarPanel(title, rows[0].key.unit, bars, note)] if bars else []


def _label(row: Row) -> str:
    key = row.key
    return key.system if key.regime is None else f"{key.system}, {key.batch} × {key.context} cached"
