from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from piecework.bench.serving.workload import (
    Lengths,
    draw_arrivals,
    draw_lengths,
    draw_texts,
    draw_tokens,
)

COUNT = 4000


def lengths(shape: Lengths, *, input: int = 220, output: int = 200, max_length: int = 2048, seed: int = 0):
    made = draw_lengths(shape, count=COUNT, input=input, output=output, max_length=max_length, seed=seed)
    assert len(made) == COUNT
    assert all(one.input >= 1 and one.output >= 1 and one.input + one.output <= max_length for one in made)
    return np.array([one.input for one in made]), np.array([one.output for one in made])


def test_fixed_lengths() -> None:
    inputs, outputs = lengths(Lengths.FIXED, input=7, output=3)
    assert set(inputs) == {7}
    assert set(outputs) == {3}


def test_random_lengths_are_even_around_the_mean() -> None:
    inputs, outputs = lengths(Lengths.RANDOM, input=128, output=64)
    assert (inputs.min(), inputs.max(), outputs.min(), outputs.max()) == (64, 192, 32, 96)
    assert abs(inputs.mean() - 128) < 2
    assert abs(np.percentile(inputs, 25) - 96) < 4


def test_chats_are_mostly_short_and_sometimes_long() -> None:
    inputs, outputs = lengths(Lengths.SHAREGPT)
    for found, mean, sigma in ((inputs, 220, 1.1), (outputs, 200, 0.8)):
        assert np.median(found) == pytest.approx(mean * math.exp(-(sigma**2) / 2), rel=0.1)
        assert found.mean() == pytest.approx(mean, rel=0.1)
        assert np.log(found).std() == pytest.approx(sigma, rel=0.1)
        assert found.min() >= 4
    assert inputs.max() == 1024


def test_no_request_is_longer_than_allowed() -> None:
    inputs, outputs = lengths(Lengths.SHAREGPT, max_length=64)
    assert inputs.max() == 32
    assert (inputs + outputs).max() == 64


def test_lengths_follow_from_the_seed() -> None:
    for shape in (Lengths.RANDOM, Lengths.SHAREGPT):
        assert np.array_equal(lengths(shape), lengths(shape))
        assert not np.array_equal(lengths(shape), lengths(shape, seed=1))


def test_arrivals_are_a_poisson_process() -> None:
    times = draw_arrivals(count=COUNT, rate=8.0, seed=0)
    assert times[0] == 0.0
    gaps = np.array([after - before for before, after in pairwise(times)])
    assert len(times) == COUNT
    assert gaps.min() >= 0
    # the mean and the standard deviation of an exponential distribution are the same
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 8, rel=0.1)
    assert draw_arrivals(count=COUNT, rate=8.0, seed=0) == times
    assert draw_arrivals(count=3, rate=math.inf, seed=0) == [0.0, 0.0, 0.0]


def test_prompts_of_tokens() -> None:
    prompts = draw_tokens([3, 5000], vocab=1000, seed=0)
    assert [len(prompt) for prompt in prompts] == [3, 5000]
    assert (min(prompts[1]), max(prompts[1])) == (300, 999)
    assert min(draw_tokens([1000], vocab=270, seed=0)[0]) == 135


def test_prompts_of_words() -> None:
    texts = draw_texts([100, 1], tokens_per_word=2.0, seed=0)
    assert [len(text.split()) for text in texts] == [50, 1]
    assert texts == draw_texts([100, 1], tokens_per_word=2.0, seed=0)
