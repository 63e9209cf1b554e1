"""Chats: how long they are, and what their times come to."""

from __future__ import annotations

import math

import pytest

from benchmarks.common.chats import ChatLoad, Outcome, figures_of, percentile

LOAD = ChatLoad(200, 100, 50, 256)


def test_lengths_are_those_of_chats_and_always_the_same() -> None:
    made = LOAD.draw(vocab=1000)
    assert made == LOAD.draw(vocab=1000)
    inputs = sorted(len(prompt) for prompt, _ in made)
    assert inputs[100] < 70 < sum(inputs) / 200  # many short ones, and few long ones
    assert all(4 <= len(prompt) <= 128 and len(prompt) + output <= 256 for prompt, output in made)
    assert {token for prompt, _ in made for token in prompt} <= set(range(300, 1000))


def test_a_small_vocabulary() -> None:
    tokens = {token for prompt, _ in LOAD.draw(vocab=131) for token in prompt}
    assert (min(tokens), max(tokens)) == (65, 130)


def test_figures_of_two_requests() -> None:
    outcomes = [Outcome(0.0, (0.2, 0.6, 1.0), 3), Outcome(0.5, (1.5,), 1)]
    made = figures_of(outcomes)
    assert made["request_throughput"] == 2 / 2.0
    assert made["output_throughput"] == 4 / 2.0
    assert made["mean_ttft_ms"] == pytest.approx(850)
    assert made["median_tpot_ms"] == made["p99_tpot_ms"] == pytest.approx(400)  # of the first one only
    assert made["mean_itl_ms"] == pytest.approx(400)


def test_requests_of_one_token_have_no_time_between_tokens() -> None:
    assert {name for name in figures_of([Outcome(0.0, (0.5,), 1)]) if "tpot" in name or "itl" in name} == set()


def test_percentiles_are_interpolated() -> None:
    assert percentile([4.0, 1.0, 2.0, 3.0], 50.0) == 2.5
    assert percentile([1.0, 2.0], 99.0) == pytest.approx(1.99)
    assert math.isclose(percentile([7.0], 99.0), 7.0)
