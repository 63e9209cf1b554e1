"""Choosing tokens: greedy, filtered, seeded, and independent of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from piecework.engine.request import GenerationRequest, SamplingParams
from piecework.engine.sampler import Sampler, token_probabilities

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])


def make_request(request_id: int = 0, **params: Any) -> GenerationRequest:
    return GenerationRequest(request_id, (1,), SamplingParams(**params))


def draw(sampler: Sampler, request: GenerationRequest, count: int = 20) -> list[int]:
    return [sampler.choose(LOGITS.unsqueeze(0), [request])[0] for _ in range(count)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(Sampler(), make_request()) == [1] * 20


def test_the_distribution_is_the_softmax() -> None:
    found = token_probabilities(LOGITS, SamplingParams(temperature=0.5))
    torch.testing.assert_close(found, torch.softmax(LOGITS / 0.5, -1))


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 100}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.7}, {1, 2}),
        ({"top_p": 1e-9}, {1}),
        ({"top_k": 3, "top_p": 0.7}, {1, 2}),
    ],
)
def test_filters_keep_the_likeliest(params: dict[str, Any], kept: set[int]) -> None:
    found = token_probabilities(LOGITS, SamplingParams(temperature=1.0, **params))
    assert set(found.nonzero().flatten().tolist()) == kept
    assert found.sum().item() == pytest.approx(1.0)


def test_equal_seeds_give_equal_tokens() -> None:
    params: dict[str, Any] = {"temperature": 2.0, "seed": 5}
    first = draw(Sampler(), make_request(1, **params))
    assert first == draw(Sampler(), make_request(2, **params))
    assert first != draw(Sampler(), make_request(1, temperature=2.0, seed=6))
    assert len(set(first)) > 1


def test_a_request_gets_the_same_tokens_in_any_batch() -> None:
    request = make_request(1, temperature=2.0, seed=5)
    alone = draw(Sampler(), request, count=8)
    sampler, others = Sampler(), [make_request(2, temperature=1.0, seed=9), make_request(3)]
    logits = torch.stack([LOGITS.flip(0), LOGITS, -LOGITS])
    together = [sampler.choose(logits, [others[0], request, others[1]])[1] for _ in range(8)]
    assert together == alone


def test_without_a_seed_requests_differ() -> None:
    draws = [draw(Sampler(), make_request(temperature=5.0), count=40) for _ in range(2)]
    assert draws[0] != draws[1]


def test_a_forgotten_request_starts_anew() -> None:
    sampler, request = Sampler(), make_request(1, temperature=2.0, seed=5)
    first = draw(sampler, request)
    sampler.forget(request)
    assert draw(sampler, request) == first


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    found = token_probabilities(LOGITS.bfloat16(), SamplingParams(temperature=1.0))
    assert found.dtype == torch.float32
