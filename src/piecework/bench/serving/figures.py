"""What the outcomes of requests come to: counts, throughput, and the latencies' means and percentiles."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

_WIDTH: Final = 50


@dataclass(frozen=True)
class Outcome:
    """What became of a request. Times are in seconds.

    Args:
        begin_s: when it was sent, after the first one.
        latency_s: from then to its end.
        token_s: from then to each event with a token.
        input_tokens, output_tokens: of prompt and continuation, as the server counts, else as asked for or seen.
        error: why it failed; "" where it didn't.
    """

    begin_s: float
    latency_s: float
    token_s: tuple[float, ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.token_s[0]

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first; None where there is one only."""
        if self.output_tokens < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Times between tokens that follow each other."""
        return tuple(after - before for before, after in pairwise(self.token_s))

    def to_json(self) -> dict[str, object]:
        """Return the outcome as a JSON object, in milliseconds."""
        made: dict[str, object] = {"begin_s": round(self.begin_s, 4), "latency_ms": round(1e3 * self.latency_s, 2)}
        made |= {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens}
        if self.error:
            return made | {"error": self.error}
        return made | {"ttft_ms": round(1e3 * self.ttft_s, 2), "itl_ms": [round(1e3 * s, 2) for s in self.itl_s]}


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of values; None where there are none."""

    mean: float
    median: float
    p90: float
    p99: float


@dataclass(frozen=True)
class ServeFigures:
    """The figures of a run; latencies in milliseconds, rates per second.

    Attributes:
        errors: how often each error came.
        ttft, tpot, itl: time to first token and time per output token (of requests), inter-token latency (of tokens).
    """

    completed: int
    failed: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    errors: tuple[tuple[str, int], ...]
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None

    @property
    def request_throughput(self) -> float:
        """Completed requests per second."""
        return self.completed / self.duration_s

    @property
    def output_throughput(self) -> float:
        """Generated tokens per second."""
        return self.output_tokens / self.duration_s

    @property
    def total_throughput(self) -> float:
        """Tokens of prompts and continuations per second."""
        return (self.input_tokens + self.output_tokens) / self.duration_s

    def to_json(self) -> dict[str, object]:
        """Return the figures as a JSON object, under the names that other serving benchmarks give them."""
        made: dict[str, object] = {
            "completed": self.completed,
            "failed": self.failed,
            "duration": round(self.duration_s, 4),
            "total_input_tokens": self.input_tokens,
            "total_output_tokens": self.output_tokens,
            "request_throughput": round(self.request_throughput, 4),
            "output_throughput": round(self.output_throughput, 3),
            "total_token_throughput": round(self.total_throughput, 3),
            "errors": dict(self.errors),
        }
        for name, spread in (("ttft", self.ttft), ("tpot", self.tpot), ("itl", self.itl)):
            for statistic in ("mean", "median", "p90", "p99"):
                value = None if spread is None else round(getattr(spread, statistic), 3)
                made[f"{statistic}_{name}_ms"] = value
        return made

    def to_text(self) -> str:
        """Return the table that users of serving benchmarks know."""
        lines = [_title("Serving Benchmark Result", "=")]
        lines += [_line("Successful requests:", self.completed), _line("Failed requests:", self.failed)]
        lines += [_line("Benchmark duration (s):", self.duration_s)]
        lines += [_line("Total input tokens:", self.input_tokens)]
        lines += [_line("Total generated tokens:", self.output_tokens)]
        lines += [_line("Request throughput (req/s):", self.request_throughput)]
        lines += [_line("Output token throughput (tok/s):", self.output_throughput)]
        lines += [_line("Total Token throughput (tok/s):", self.total_throughput)]
        for title, short, spread in (
            ("Time to First Token", "TTFT", self.ttft),
            ("Time per Output Token (excl. 1st token)", "TPOT", self.tpot),
            ("Inter-token Latency", "ITL", self.itl),
        ):
            lines.append(_title(title, "-"))
            for name in ("Mean", "Median", "P99"):
                value = "-" if spread is None else getattr(spread, name.lower())
                lines.append(_line(f"{name} {short} (ms):", value))
        lines.append("=" * _WIDTH)
        lines += [f"failed, {count} ×: {error}" for error, count in self.errors]
        return "\n".join(lines)


def figures_of(outcomes: Sequence[Outcome]) -> ServeFigures:
    """Return what the outcomes of a run come to; its duration is from the first request to the last one's end."""
    done = [outcome for outcome in outcomes if not outcome.error]
    duration_s = max((o.begin_s + o.latency_s for o in outcomes), default=0.0)
    return ServeFigures(
        completed=len(done),
        failed=len(outcomes) - len(done),
        duration_s=max(duration_s, 1e-9),
        input_tokens=sum(o.input_tokens for o in done),
        output_tokens=sum(o.output_tokens for o in done),
        errors=tuple(Counter(o.error for o in outcomes if o.error).most_common()),
        ttft=spread_of([1e3 * o.ttft_s for o in done]),
        tpot=spread_of([1e3 * t for t in (o.tpot_s for o in done) if t is not None]),
        itl=spread_of([1e3 * s for o in done for s in o.itl_s]),
    )


def spread_of(values: Sequence[float]) -> Spread | None:
    """Return mean and percentiles of values; None where there are none."""
    if not values:
        return None
    ordered = sorted(values)
    at = [percentile(ordered, percent) for percent in (50.0, 90.0, 99.0)]
    return Spread(math.fsum(ordered) / len(ordered), *at)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of values in ascending order, interpolated linearly between the two nearest ones."""
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _title(text: str, fill: str) -> str:
    return f" {text} ".center(_WIDTH, fill) if fill == "=" else text.center(_WIDTH, fill)


def _line(name: str, value: float | str) -> str:
    return f"{name:<40} {f'{value:.2f}' if isinstance(value, float) else value}"
