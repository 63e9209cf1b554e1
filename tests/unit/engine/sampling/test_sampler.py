"""The sampler as a whole: batches of every kind against a reference in plain Python, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.engine.sampling.random_numbers import stream_start, uniforms
from piecework.engine.sampling.sampler import SampledToken, Sampler, SamplingRow
from piecework.engine.sampling_params import SamplingParams
from piecework.errors import RequestError
from tests.unit.engine.sampling.sampling_reference import Reference, reference_distribution, reference_logprobs

VOCAB, EOS = 61, (0, 7)


def make_row(
    index: int = 0, *, prompt: Sequence[int] = (1, 2, 3), generated: Sequence[int] = (), **params: Any
) -> SamplingRow:
    return SamplingRow((f"r{index}", index % 3), SamplingParams(**params), prompt, generated)


def make_sampler() -> Sampler:
    return Sampler(vocab_size=VOCAB, eos_token_ids=EOS)


def random_logits(seed: int, rows: int, *, vocab: int = VOCAB, ties: bool = False) -> torch.Tensor:
    logits = 3.0 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    return logits.round() if ties else logits


def expected_token(logits: torch.Tensor, row: SamplingRow) -> tuple[int, float]:
    """Return the reference's token, and how far the random number is from choosing another."""
    params = row.params
    weights = reference_distribution(
        logits.tolist(), Reference(params, list(row.prompt), list(row.generated), end_tokens=EOS)
    )
    if params.greedy:
        return weights[0][0], 1.0
    import numpy as np

    start = np.array([stream_start(params.seed or 0, row.key[1])], dtype=np.uint64)
    number = float(uniforms(start, np.array([len(row.generated)], dtype=np.uint64))[0])
    if (params.top_k == 0 or params.top_k >= len(logits)) and params.top_p == 1.0 and params.min_p == 0.0:
        weights = sorted(weights)  # without a filter, tokens are in their own order
    running, distance = 0.0, math.inf
    chosen = None
    for token, weight in weights:
        running += weight
        distance = min(distance, abs(running - number))
        if chosen is None and running > number:
            chosen = token
    return weights[-1][0] if chosen is None else chosen, distance


params_strategy = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 2, 7, 60, 61, 1000]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.7, -0.4]),
        "logit_bias": st.sampled_from([{}, {}, {5: 100.0}, {3: -100.0, 60: 2.5}]),
        "min_tokens": st.sampled_from([0, 0, 3]),
        "stop_token_ids": st.sampled_from([(), (11, 12)]),
        "seed": st.integers(-(2**63), 2**63 - 1),
    }
)


@settings(deadline=None, max_examples=150)
@given(
    many=st.lists(params_strategy, min_size=1, max_size=6),
    generated=st.lists(st.integers(0, VOCAB - 1), max_size=6),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
)
def test_any_mixture_of_parameters_agrees_with_the_reference(
    many: list[dict[str, Any]], generated: list[int], *, seed: int, ties: bool
) -> None:
    logits = random_logits(seed, len(many), ties=ties)
    rows = [make_row(place, generated=generated, **params) for place, params in enumerate(many)]
    before = logits.clone()
    found = make_sampler().sample(logits, rows)
    assert torch.equal(logits, before)
    for place, row in enumerate(rows):
        token, distance = expected_token(logits[place], row)
        assert found[place].token == token or distance < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_all_greedy_batch_takes_the_first_of_the_greatest_logits(dtype: torch.dtype) -> None:
    logits = random_logits(3, 8, ties=True).to(dtype)
    found = make_sampler().sample(logits, [make_row(place) for place in range(8)])
    assert found == [SampledToken(row.index(max(row))) for row in logits.tolist()]


def test_the_same_tokens_in_any_batch() -> None:
    params: dict[str, Any] = {"temperature": 1.5, "seed": 5, "top_p": 0.95}
    logits = random_logits(1, 20)

    def draw(order: list[int]) -> dict[int, int]:
        rows = [make_row(place, **(params if place % 2 else {"top_k": place + 1, "temperature": 0.9, "seed": 2}))
                for place in order]  # fmt: skip
        found = make_sampler().sample(logits[order], rows)
        return dict(zip(order, (one.token for one in found), strict=True))

    together = draw(list(range(20)))
    assert together == draw(list(reversed(range(20))))
    for place in range(20):
        assert draw([place]) == {place: together[place]}


def test_preemption_and_forgetting_change_nothing_for_a_seed() -> None:
    params: dict[str, Any] = {"temperature": 2.0, "seed": 9, "presence_penalty": 1.0, "repetition_penalty": 1.2}
    logits = random_logits(2, 12)

    def generate(*, forgets: bool) -> list[int]:
        sampler, generated = make_sampler(), []
        for step in range(12):
            row = make_row(generated=list(generated), **params)
            generated.append(sampler.sample(logits[step : step + 1], [row])[0].token)
            if forgets:
                sampler.forget(row.key)
        return generated

    assert generate(forgets=False) == generate(forgets=True)


def test_sequences_of_a_request_differ_and_repeat() -> None:
    logits = random_logits(4, 1).expand(3, -1)
    rows = [SamplingRow(("r", index), SamplingParams(temperature=3.0, seed=1, n=3), (1,), ()) for index in range(3)]
    found = [
        [one.token for one in make_sampler().sample(logits * 0.1, [SamplingRow(r.key, r.params, (1,), (0,) * step)
                                                                   for r in rows])]
        for step in range(10)
    ]  # fmt: skip
    assert len({tuple(sequence) for sequence in zip(*found, strict=True)}) == 3


def test_without_a_seed_requests_differ_but_keep_their_own() -> None:
    logits = torch.zeros(2, VOCAB)
    sampler = make_sampler()
    rows = [make_row(place, temperature=1.0) for place in range(2)]
    first = [one.token for one in sampler.sample(logits, rows)]
    assert first == [one.token for one in sampler.sample(logits, rows)]
    draws = {tuple(one.token for one in make_sampler().sample(logits, rows)) for _ in range(30)}
    assert len(draws) > 10


@pytest.mark.parametrize(
    "params",
    [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.7, "min_p": 0.1}, {"min_p": 0.2}],
)
def test_tokens_come_as_often_as_their_probability_says(params: dict[str, Any]) -> None:
    logits = random_logits(8, 1, vocab=VOCAB)
    count = 4000
    rows = [make_row(place, temperature=1.3, seed=place, **params) for place in range(count)]
    found = [one.token for one in make_sampler().sample(logits.expand(count, -1), rows)]
    expected = dict(reference_distribution(logits[0].tolist(), Reference(rows[0].params, [], [], end_tokens=EOS)))
    assert set(found) <= set(expected)
    statistic = sum(
        (found.count(token) - count * p) ** 2 / (count * p) for token, p in expected.items() if p * count > 5
    )
    freedom = sum(p * count > 5 for p in expected.values())
    assert statistic < freedom + 4.0 * math.sqrt(2.0 * freedom) + 4.0


@pytest.mark.parametrize("ties", [False, True])
def test_logprobs_are_those_of_the_raw_logits(ties: bool) -> None:
    logits = random_logits(5, 4, ties=ties)
    rows = [
        make_row(0, logprobs=3, temperature=0.5, seed=1, logit_bias={4: 50.0}),
        make_row(1),
        make_row(2, logprobs=0, repetition_penalty=1.5),
        make_row(3, logprobs=1000),
    ]
    found = make_sampler().sample(logits, rows)
    assert found[0].token == 4
    assert found[1].logprob is None
    for place, count in ((0, 3), (2, 0), (3, VOCAB)):
        logprobs = reference_logprobs(logits[place].tolist())
        assert found[place].logprob == pytest.approx(logprobs[found[place].token], abs=1e-5)
        best = sorted(range(VOCAB), key=lambda token: (-float(logits[place, token]), token))[:count]
        assert [token for token, _ in found[place].top] == best
        assert [logprob for _, logprob in found[place].top] == pytest.approx([logprobs[t] for t in best], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_logprobs(dtype: torch.dtype) -> None:
    logits = random_logits(6, 150).to(dtype)
    tokens = [(7 * place) % VOCAB for place in range(150)]
    found = make_sampler().prompt_logprobs(logits, tokens, top=2)
    assert [one.token for one in found] == tokens
    for place in (0, 63, 64, 149):
        logprobs = reference_logprobs(logits[place].tolist())
        assert found[place].logprob == pytest.approx(logprobs[tokens[place]], abs=1e-5)
        best = sorted(range(VOCAB), key=lambda token: (-logprobs[token], token))[:2]
        assert [token for token, _ in found[place].top] == best


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000, 5000])
@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.9}, {}, {"min_p": 0.3}, {"top_k": 700, "top_p": 0.99}])
@pytest.mark.parametrize("ties", [False, True])
def test_vocabularies_of_any_size(vocab: int, params: dict[str, Any], ties: bool) -> None:
    logits = random_logits(vocab, 5, vocab=vocab, ties=ties) * 0.3
    sampler = Sampler(vocab_size=vocab)
    rows = [make_row(place, temperature=1.0, seed=place, **params) for place in range(5)]
    for place, one in enumerate(sampler.sample(logits, rows)):
        token, distance = expected_token(logits[place], rows[place])
        assert one.token == token or distance < 1e-5


def test_broken_logits_give_some_token() -> None:
    for value in (math.nan, -math.inf, math.inf):
        logits = torch.full((4, VOCAB), value)
        rows = [
            make_row(0, temperature=1.0),
            make_row(1, temperature=1.0, top_k=3),
            make_row(2, temperature=1.0, top_p=0.5, logprobs=2),
            make_row(3, temperature=1.0, min_p=0.5, repetition_penalty=1.1),
        ]
        assert all(0 <= one.token < VOCAB for one in make_sampler().sample(logits, rows))


def test_one_broken_logit_is_never_drawn() -> None:
    logits = random_logits(7, 3)
    logits[:, 9] = math.nan
    for seed in range(20):
        rows = [
            make_row(0, temperature=1.0, seed=seed, top_k=3),
            make_row(1, temperature=1.0, seed=seed, top_p=0.5),
            make_row(2, temperature=1.0, seed=seed),
        ]
        assert all(one.token != 9 for one in make_sampler().sample(logits, rows))


def test_requests_that_do_not_suit_the_model_are_refused() -> None:
    make_sampler().check(SamplingParams(logit_bias={60: 1.0}, stop_token_ids=(60,)))
    for params in (SamplingParams(logit_bias={61: 1.0}), SamplingParams(stop_token_ids=(1, 61))):
        with pytest.raises(RequestError, match="token id 61"):
            make_sampler().check(params)
