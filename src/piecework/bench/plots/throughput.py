"""The figure of `bench throughput`: systems beside each other, a panel per metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from piecework.bench.goals import Goal
from piecework.bench.measurements import Measured
from piecework.bench.plots.figure import Bar, BarPanel, Figure

_TITLES: Final = {
    "output_tok_s": "Generated tokens, batch",
    "total_tok_s": "Tokens of prompts and continuations, batch",
    "one_request_tok_s": "Generated tokens, one request alone",
    "first_token_s": "Process start to first token, warm (less is better)",
}


def throughput_figure(
    result: Measured, goals: Sequence[Goal], *, settings: Mapping[str, Any], about: Mapping[str, Any]
) -> Figure:
    """Return the figure of rows, with their notes, the goals that they are held against, and what was measured on."""
    rows = result.rows
    systems = list(dict.fromkeys(row.key.system for row in rows))
    panels = []
    for metric, title in _TITLES.items():
        found = [row for row in rows if row.key.metric == metric]
        if found:
            bars = (Bar(r.key.system, r.value, r.min, r.max, systems.index(r.key.system)) for r in found)
            note = "; ".join(str(goal) for goal in goals if goal.key.metric == metric)
            panels.append(BarPanel(title, found[0].key.unit, tuple(bars), note))
    subtitle = "{model}, {dtype}: {requests} requests of {input} + {output} tokens, offline; rounds: {repeats}"
    return Figure("Throughput", subtitle.format(**settings), tuple(panels), (*result.notes, *remarks_of(about)))


def remarks_of(about: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what was measured on: machine, and versions with the commit."""
    versions = {**about["versions"], "commit": about["commit"]}
    return tuple(", ".join(f"{name} {value}" for name, value in part.items()) for part in (about["machine"], versions))
