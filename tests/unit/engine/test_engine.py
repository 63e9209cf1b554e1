"""The engine on a model that is all about its KV cache: tokens are those of a request alone, whatever goes on."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piecework.engine.engine import Engine
from piecework.engine.request import FinishReason, GenerationRequest
from piecework.engine.sampling_params import SamplingParams
from piecework.errors import CapacityError, RequestError
from tests.unit.engine.paged_model import EOS, POSITIONS, VOCAB, Collected, PagedModel, alone, make_engine, run_all


def make_request(name: object, prompt: list[int], num_new: int, **params: Any) -> GenerationRequest:
    return GenerationRequest(str(name), tuple(prompt), SamplingParams(max_tokens=num_new, **params))


def wanted(requests: list[GenerationRequest]) -> dict[tuple[str, int], list[int]]:
    return {key: tokens for request in requests for key, tokens in alone(request).items()}


def random_requests(count: int, *, seed: int) -> list[GenerationRequest]:
    """Return requests of all kinds: shared beginnings, one token to many, n > 1, seeds, prompts' own logprobs."""
    rng = random.Random(seed)
    stems = [[rng.randrange(3, VOCAB) for _ in range(40)] for _ in range(3)]
    requests = []
    for index in range(count):
        prompt = rng.choice(stems)[: rng.randrange(41)] + [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 9))]
        params: dict[str, Any] = {"n": rng.choice((1, 1, 1, 2, 3)), "ignore_eos": rng.random() < 0.8}
        if rng.random() < 0.4:
            params |= {"temperature": 1.0, "top_p": 0.9, "seed": rng.randrange(1000)}
        if rng.random() < 0.15:
            params["prompt_logprobs"] = 2
        requests.append(make_request(index, prompt, rng.randrange(1, 30), **params))
    return requests


def assert_nothing_is_held(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.kv_blocks_used) == (0, 0, 0)
    assert not engine._sequences
    assert not engine._rows
    assert not engine._prompt_logprobs
    assert not engine._inputs._places


@pytest.mark.parametrize(
    ("num_blocks", "max_tokens", "max_seqs"), [(24, 16, 8), (24, 7, 40), (40, 64, 40), (400, 1000, 100)]
)
def test_40_mixed_requests_equal_themselves_alone(num_blocks: int, max_tokens: int, max_seqs: int) -> None:
    requests = random_requests(40, seed=max_tokens)
    model = PagedModel(max_tokens=max_tokens, max_seqs=max_seqs)
    engine = make_engine(model, num_blocks=num_blocks)
    found = Collected()
    for request in requests[:25]:
        engine.add(request)
    for request in requests[25:]:
        engine.add(request)
        found.add(engine.step())
    run_all(engine, found)
    assert found.tokens == wanted(requests)
    assert found.reasons.keys() == found.tokens.keys()
    stats = engine.stats()
    assert stats.prefix_hit_tokens > 0
    assert (stats.preemptions > 0) is (num_blocks < 100)
    assert stats.generated_tokens == sum(len(tokens) for tokens in found.tokens.values())
    assert_nothing_is_held(engine)


params = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(1, 3),
        "temperature": st.just(1.0),
        "prompt_logprobs": st.integers(0, 2),
        "ignore_eos": st.just(True),
    },
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(3, 4), min_size=1, max_size=24), st.integers(1, 12), params),
        st.tuples(st.just("abort"), st.integers(0, 5), st.sampled_from([None, 0, 1])),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.just(("swap",)),
    ),
    min_size=1,
    max_size=24,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    actions=actions,
    num_blocks=st.integers(9, 20),
    block_size=st.sampled_from([1, 2, 4, 5]),
    max_tokens=st.integers(1, 40),
    max_seqs=st.integers(1, 6),
    prefix_caching=st.booleans(),
)
def test_whatever_happens_tokens_are_those_of_a_request_alone(
    actions: list[Any], num_blocks: int, block_size: int, max_tokens: int, max_seqs: int, prefix_caching: bool
) -> None:
    recurrent = not prefix_caching  # a prefix's state isn't kept
    model = PagedModel(block_size=block_size, max_tokens=max_tokens, max_seqs=max_seqs, recurrent=recurrent)
    engine = make_engine(model, num_blocks=num_blocks * 4 // block_size, prefix_caching=prefix_caching)
    found = Collected()
    requests: dict[str, GenerationRequest] = {}
    aborted: set[tuple[str, int]] = set()
    for action in actions:
        if action[0] == "add":
            _, prompt, num_new, given_params = action
            seed = {"seed": len(requests)} if "temperature" in given_params else {}
            request = make_request(len(requests), prompt, num_new, **given_params, **seed)
            engine.add(request)
            requests[request.request_id] = request
        elif action[0] == "abort":
            used = engine.stats().kv_blocks_used
            ended = engine.abort(str(action[1]), action[2])
            assert engine.stats().kv_blocks_used <= used
            known = requests.get(str(action[1]))
            gone = [(str(action[1]), i) for i in range(known.params.n if known else 0) if action[2] in (None, i)]
            assert ended == len([key for key in gone if key not in found.reasons and key not in aborted])
            aborted.update(key for key in gone if key not in found.reasons)
        elif action[0] == "step":
            for _ in range(action[1]):
                found.add(engine.step())
        else:
            # the same answers from other states: what was left in the cache would be wrong
            old = model
            model = PagedModel(block_size=block_size, max_tokens=max_tokens, max_seqs=max_seqs, recurrent=recurrent)
            engine.swap_runner(model)
            assert old.closed
    run_all(engine, found)
    expected = wanted(list(requests.values()))
    for key, tokens in expected.items():
        if key in aborted:
            assert found.tokens.get(key, []) == tokens[: len(found.tokens.get(key, []))]
            assert key not in found.reasons
        else:
            assert found.tokens[key] == tokens
            assert key in found.reasons
    for output in found.outputs:
        if output.prompt_logprobs is not None:
            assert len(output.prompt_logprobs) == len(requests[output.request_id].prompt)
    assert_nothing_is_held(engine)


def test_nothing_of_the_old_models_states_is_used_after_a_swap() -> None:
    request = make_request("a", [5, 6, 7, 8, 9], 20, ignore_eos=True)
    old, new = PagedModel(), PagedModel(salt=9)
    engine = make_engine(old)
    engine.add(request)
    found = Collected()
    for _ in range(7):
        found.add(engine.step())
    engine.swap_runner(new)
    run_all(engine, found)
    tokens = found.tokens["a", 0]
    assert tokens[:7] == alone(request)["a", 0][:7]
    rest = make_request("a", [*request.prompt, *tokens[:7]], 13, ignore_eos=True)
    assert tokens[7:] == alone(rest, salt=9)["a", 0]
    assert old.closed


def test_chunks_decodes_and_their_order_in_a_batch() -> None:
    model = PagedModel(max_tokens=8)
    engine = make_engine(model)
    engine.add(make_request("a", [3, 4], 9, ignore_eos=True))
    engine.step()
    engine.add(make_request("b", list(range(3, 20)), 2, ignore_eos=True))
    for _ in range(4):
        engine.step()
    # tokens, sequences, decoding ones: one token for a, the rest of the budget for b's prompt
    assert model.batches == [(2, 1, 0), (8, 2, 1), (8, 2, 1), (4, 2, 1), (2, 2, 2)]


@pytest.mark.parametrize("max_tokens", [3, 64])
def test_logprobs_of_a_prompt_do_not_depend_on_chunks_caches_and_preemptions(max_tokens: int) -> None:
    prompt = list(range(3, 24))
    request = make_request("scored", prompt, 9, prompt_logprobs=3, ignore_eos=True, n=2)

    def scores(engine: Engine) -> Any:
        found = Collected()
        run_all(engine, found)
        (told,) = [output for output in found.outputs if output.prompt_logprobs is not None]
        assert (told.request_id, told.index, told.sampled.token) == ("scored", 0, found.tokens["scored", 0][0])
        return told.prompt_logprobs

    plain = make_engine(PagedModel())
    plain.add(request)
    expected = scores(plain)
    assert expected[0] is None
    assert [score.token for score in expected[1:]] == prompt[1:]
    assert all(len(score.top) == 3 for score in expected[1:])
    engine = make_engine(PagedModel(max_tokens=max_tokens), num_blocks=11)
    engine.add(make_request("first", prompt, 14, ignore_eos=True))
    for _ in range(12):
        engine.step()
    engine.add(request)
    found = scores(engine)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.token == theirs.token
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)


def test_a_prompt_of_one_token_has_no_logprobs_of_its_own() -> None:
    engine = make_engine(PagedModel())
    engine.add(make_request("a", [7], 1, prompt_logprobs=1))
    (output,) = engine.step()
    assert output.prompt_logprobs == (None,)


def test_cached_tokens_are_told_with_the_first_token() -> None:
    engine = make_engine(PagedModel())
    for name in "ab":
        engine.add(make_request(name, list(range(3, 20)), 2, ignore_eos=True))
        found = Collected()
        run_all(engine, found)
        assert [output.num_cached for output in found.outputs] == [0 if name == "a" else 16, 0]
    stats = engine.stats()
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens, stats.prompt_tokens) == (34, 16, 34)


def test_end_tokens() -> None:
    answers = alone(make_request("a", [5, 9], 80, ignore_eos=True))["a", 0]
    at = answers.index(EOS)
    with_eos = make_engine(PagedModel())
    with_eos.add(make_request("a", [5, 9], 80))
    found = Collected()
    run_all(with_eos, found)
    assert found.tokens["a", 0] == answers[: at + 1]
    assert found.reasons["a", 0] is FinishReason.STOP
    stopped = make_engine(PagedModel())
    stopped.add(make_request("a", [5, 9], 80, ignore_eos=True, stop_token_ids=(answers[3],)))
    found = Collected()
    run_all(stopped, found)
    assert found.tokens["a", 0] == answers[: answers.index(answers[3]) + 1]


def test_a_text_ends_where_the_positions_do() -> None:
    engine = make_engine(PagedModel())
    engine.add(make_request("a", [5] * (POSITIONS - 2), 9, ignore_eos=True))
    found = Collected()
    run_all(engine, found)
    assert len(found.tokens["a", 0]) == 2
    assert found.reasons["a", 0] is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("prompt", "found"), [([5] * POSITIONS, f"{POSITIONS} tokens"), ([4, VOCAB], f"is {VOCAB}"), ([4, -1], "is -1")]
)
def test_impossible_prompts_are_refused(prompt: list[int], found: str) -> None:
    engine = make_engine(PagedModel())
    with pytest.raises(RequestError, match=found):
        engine.add(make_request("a", prompt, 4))
    assert_nothing_is_held(engine)


def test_more_than_the_cache_holds_is_refused_whatever_n() -> None:
    engine = make_engine(PagedModel(), num_blocks=2)
    with pytest.raises(CapacityError):
        engine.add(make_request("a", [5] * 6, 4, n=3))
    assert_nothing_is_held(engine)


def test_a_token_outside_the_vocabulary_in_the_parameters_is_refused() -> None:
    with pytest.raises(RequestError, match=str(VOCAB)):
        make_engine(PagedModel()).add(make_request("a", [5], 4, logit_bias={VOCAB: 1.0}))


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    engine = make_engine(PagedModel())
    engine.add(make_request("a", [5], 4))
    with pytest.raises(RequestError, match="is running"):
        engine.add(make_request("a", [6], 4))
    assert engine.abort("a") == 1
    engine.add(make_request("a", [6], 4))
    assert engine.abort("nobody") == 0


@pytest.mark.parametrize("aborted", [False, True])
def test_a_later_request_of_the_same_id_gets_random_numbers_of_its_own(aborted: bool) -> None:
    engine = make_engine(PagedModel())
    first = make_request("a", [5], 6, ignore_eos=True, temperature=1.0, seed=1)
    second = make_request("a", [5], 6, ignore_eos=True, temperature=1.0, seed=2)
    assert alone(first) != alone(second)
    engine.add(first)
    if aborted:
        engine.step()
        assert engine.abort("a") == 1
    run_all(engine, Collected())
    engine.add(second)
    found = Collected()
    run_all(engine, found)
    assert found.tokens == alone(second)


def test_the_last_of_all_continuations_ends_the_request() -> None:
    engine = make_engine(PagedModel())
    engine.add(make_request("a", [5], 3, ignore_eos=True, n=3))
    assert engine.is_open("a")
    assert [output.ends_request for output in engine.step()] == [False] * 3
    engine.abort("a", 2)
    outputs = [*engine.step(), *engine.step()]
    assert [(output.index, output.ends_request) for output in outputs] == [
        (0, False),
        (1, False),
        (0, False),
        (1, True),
    ]
    assert not engine.is_open("a")


def test_a_step_without_work_does_nothing() -> None:
    engine = make_engine(PagedModel())
    assert engine.step() == []


def test_the_engine_imports_no_compiler_and_no_transformers() -> None:
    code = (
        "import sys, piecework.engine.engine, piecework.engine.text.tokenizer; "
        "bad = {'sympy', 'torch._dynamo', 'torch._inductor', 'triton', 'transformers', 'jinja2'} & set(sys.modules); "
        "raise SystemExit(f'imported {sorted(bad)}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
