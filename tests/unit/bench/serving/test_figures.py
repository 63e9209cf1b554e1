from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from piecework.bench.serving.figures import Outcome, figures_of, percentile, spread_of

VALUES = st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=200)


@given(VALUES, st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)


@given(VALUES)
def test_spreads_are_numpys(values: list[float]) -> None:
    found = spread_of(values)
    assert found is not None
    expected = [np.mean(values), *np.percentile(values, [50, 90, 99])]
    assert [found.mean, found.median, found.p90, found.p99] == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_nothing_has_no_spread() -> None:
    assert spread_of([]) is None


OUTCOMES = [
    Outcome(0.0, 1.5, (0.5, 1.0, 1.5), input_tokens=10, output_tokens=3),
    Outcome(1.0, 3.0, (1.0,), input_tokens=20, output_tokens=1),
    Outcome(0.5, 0.1, error="HTTP 429: too many"),
    Outcome(0.5, 9.5, (1.0, 2.0), input_tokens=7, output_tokens=2, error="the stream ended early"),
    Outcome(0.5, 0.1, error="HTTP 429: too many"),
]


def test_figures() -> None:
    figures = figures_of(OUTCOMES)
    assert (figures.completed, figures.failed) == (2, 3)
    assert figures.duration_s == 10.0
    assert (figures.input_tokens, figures.output_tokens) == (30, 4)
    assert (figures.request_throughput, figures.output_throughput, figures.total_throughput) == (0.2, 0.4, 3.4)
    assert figures.errors == (("HTTP 429: too many", 2), ("the stream ended early", 1))
    assert figures.ttft is not None
    assert (figures.ttft.mean, figures.ttft.median) == (750.0, 750.0)
    assert figures.tpot is not None
    assert figures.tpot.mean == 500.0
    assert figures.itl is not None
    assert figures.itl.p99 == 500.0


def test_tokens_that_came_together_count_in_the_time_per_token() -> None:
    # 5 tokens in 2 events: 4 after the first, in 2 s
    assert Outcome(0.0, 3.0, (1.0, 3.0), output_tokens=5).tpot_s == 0.5


def test_the_table_is_the_one_that_users_know() -> None:
    lines = figures_of(OUTCOMES).to_text().splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    table = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    assert table["Successful requests"] == "2"
    assert table["Failed requests"] == "3"
    assert table["Benchmark duration (s)"] == "10.00"
    assert table["Total input tokens"] == "30"
    assert table["Total generated tokens"] == "4"
    assert table["Request throughput (req/s)"] == "0.20"
    assert table["Output token throughput (tok/s)"] == "0.40"
    assert table["Total Token throughput (tok/s)"] == "3.40"
    assert table["Mean TTFT (ms)"] == table["Median TTFT (ms)"] == "750.00"
    assert table["P99 TTFT (ms)"] == "995.00"
    assert table["P99 TPOT (ms)"] == table["Median ITL (ms)"] == "500.00"
    assert table["failed, 2 ×"] == "HTTP 429: too many"
    assert "-----Time per Output Token (excl. 1st token)------" in lines


def test_a_run_in_which_all_fail_has_figures_as_well() -> None:
    figures = figures_of(OUTCOMES[2:3])
    assert "Mean TTFT (ms):                          -" in figures.to_text()
    found = figures.to_json()
    assert (found["completed"], found["failed"], found["mean_ttft_ms"], found["p99_itl_ms"]) == (0, 1, None, None)
    assert found["errors"] == {"HTTP 429: too many": 1}
    assert figures_of([]).completed == 0


def test_an_outcome_as_json() -> None:
    assert OUTCOMES[0].to_json() == {
        "begin_s": 0.0, "latency_ms": 1500.0, "input_tokens": 10, "output_tokens": 3, "ttft_ms": 500.0,
        "itl_ms": [500.0, 500.0],
    }  # fmt: skip
    assert OUTCOMES[2].to_json()["error"] == "HTTP 429: too many"
