"""Random numbers by seed, sequence and step."""

from __future__ import annotations

import numpy as np

from piecework.engine.sampling.random_numbers import stream_start, uniforms

SPLITMIX64_FROM_1234567 = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431)


def numbers(start: int, count: int) -> np.ndarray:
    return uniforms(np.full(count, start, dtype=np.uint64), np.arange(count, dtype=np.uint64))


def test_a_stream_is_splitmix64() -> None:
    assert numbers(1234567, 4).tolist() == [(value >> 11) / 2**53 for value in SPLITMIX64_FROM_1234567]


def test_neighbouring_seeds_and_sequences_have_nothing_in_common() -> None:
    starts = [stream_start(seed, index) for seed in (-1, 0, 1, 2, 2**63 - 1, -(2**63)) for index in range(4)]
    assert len(set(starts)) == len(starts)
    table = np.array([numbers(start, 2000) for start in starts])
    correlations = np.corrcoef(table) - np.eye(len(starts))
    assert np.abs(correlations).max() < 0.1


def test_numbers_are_spread_evenly() -> None:
    for table in (numbers(stream_start(7, 0), 20000), [numbers(stream_start(seed, 0), 1)[0] for seed in range(20000)]):
        assert min(table) >= 0.0
        assert max(table) < 1.0
        counts = np.histogram(table, bins=100, range=(0.0, 1.0))[0]
        assert ((counts - 200.0) ** 2 / 200.0).sum() < 99 + 5 * (2 * 99) ** 0.5
