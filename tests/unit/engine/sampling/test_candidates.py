"""The likeliest tokens without a sort, against a sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.engine.sampling.candidates import gather, lower_bounds
from piecework.engine.sampling.mass import mass_of


@settings(deadline=None, max_examples=100)
@given(
    vocab=st.sampled_from([1, 5, 64, 1000, 4097]),
    kind=st.sampled_from(["normal", "rounded", "equal", "mostly out", "signed zeros"]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_first_k_are_those_of_a_stable_sort(vocab: int, kind: str, seed: int, data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(3, vocab)).astype(np.float32) * 5
    if kind == "rounded":
        logits = logits.round()
    elif kind == "equal":
        logits[:] = 1.5
    elif kind == "mostly out":
        logits[random.random(logits.shape) < 0.95] = -np.inf
    elif kind == "signed zeros":
        logits = np.where(random.random(logits.shape) < 0.5, np.float32(0.0), np.float32(-0.0))
    counts = np.array([data.draw(st.integers(1, vocab)) for _ in range(3)])
    found = gather(logits, lower_bounds(logits, counts))
    for row, count in enumerate(counts):
        order = np.argsort(-logits[row], kind="stable")
        expected = [token for token in order[:count] if logits[row, token] > -np.inf]
        assert found.counts[row] >= len(expected)
        assert found.tokens[row, : len(expected)].tolist() == expected
        assert found.logits[row, : len(expected)].tolist() == logits[row, expected].tolist()
        assert np.all(found.logits[row, found.counts[row] :] == -np.inf)


def test_few_more_than_asked_for_are_gathered() -> None:
    logits = np.random.default_rng(0).normal(size=(8, 32000)).astype(np.float32)
    found = gather(logits, lower_bounds(logits, np.full(8, 50)))
    assert found.tokens.shape[1] < 70


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 1000])
def test_running_sums_find_their_place(vocab: int) -> None:
    random = np.random.default_rng(vocab)
    logits = (4 * random.normal(size=(300, vocab))).astype(np.float32)
    logits[random.random(logits.shape) < 0.3] = -np.inf
    logits[:, vocab // 2] = 0.0
    temperature = random.uniform(0.2, 3.0, size=300)
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature[:, None].astype(np.float64))
    sums = np.cumsum(weights, axis=1)
    mass = mass_of(logits, temperature)
    np.testing.assert_allclose(mass.totals, sums[:, -1], rtol=1e-5)
    for share in (0.0, 0.3, 0.99, 1.0 - 1e-12):
        place = mass.passing(share * mass.totals)
        rows = np.arange(300)
        assert np.all(weights[rows, place.columns] > 0)
        np.testing.assert_allclose(place.sums, sums[rows, place.columns], rtol=1e-4)
        assert np.all(sums[rows, place.columns] >= share * sums[:, -1] * (1 - 1e-5))
        before = sums[rows, place.columns] - weights[rows, place.columns]
        assert np.all(before <= share * sums[:, -1] * (1 + 1e-5) + 1e-12)
