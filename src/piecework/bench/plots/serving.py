"""The figure of `bench serve`: how latencies are distributed, and the throughput over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from piecework.bench.plots.figure import Figure, Line, LinePanel, cumulative
from piecework.bench.plots.throughput import remarks_of
from piecework.bench.serving.figures import Outcome, ServeFigures

_SHARE: Final = "% of them at most"
_BINS: Final = 40
_LEAST_BIN_S: Final = 0.1


def serving_figure(
    figures: ServeFigures, outcomes: Sequence[Outcome], *, subtitle: str, about: Mapping[str, Any]
) -> Figure:
    """Return the figure of a run; requests that failed are in its subtitle only."""
    done = [outcome for outcome in outcomes if not outcome.error]

    def shares(title: str, values: Sequence[float]) -> LinePanel:
        return LinePanel(title, "ms", _SHARE, (Line("", cumulative([1e3 * value for value in values])),))

    panels = (
        shares("Time to first token (TTFT)", [o.ttft_s for o in done]),
        shares("Time per output token after the first (TPOT)", [t for o in done if (t := o.tpot_s) is not None]),
        shares("Inter-token latency (ITL)", [s for o in done for s in o.itl_s]),
        LinePanel("Generated tokens", "seconds", "tokens/s", (Line("", rate_over_time(done)),)),
    )
    counts = f"{figures.completed} requests" + (f" and {figures.failed} that failed" if figures.failed else "")
    rates = f"{figures.output_throughput:.1f} generated tokens/s, {figures.request_throughput:.2f} requests/s"
    return Figure("Serving", f"{subtitle}: {counts}; {rates}", panels, remarks_of(about))


def rate_over_time(outcomes: Sequence[Outcome]) -> tuple[tuple[float, float], ...]:
    """Return points (second, tokens per second in the bin around it); tokens that came together count as seen."""
    tokens: list[tuple[float, float]] = []
    for outcome in outcomes:
        weight = outcome.output_tokens / len(outcome.token_s)
        tokens += [(outcome.begin_s + seconds, weight) for seconds in outcome.token_s]
    if not tokens:
        return ()
    end = max(seconds for seconds, _ in tokens)
    width = max(end / _BINS, _LEAST_BIN_S)
    counts = [0.0] * (math.floor(end / width) + 1)
    for seconds, weight in tokens:
        counts[math.floor(seconds / width)] += weight
    return tuple(((index + 0.5) * width, count / width) for index, count in enumerate(counts))
