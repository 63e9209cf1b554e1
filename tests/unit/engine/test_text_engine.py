"""Texts from an engine, over a made-up model: the real scheduler, sampler, thread, tokenizer and stop strings."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from piecework.engine.async_engine import AsyncEngine
from piecework.engine.request import FinishReason, GenerationRequest
from piecework.engine.sampling_params import SamplingParams
from piecework.engine.text.deltas import TextDelta
from piecework.engine.text.tokenizer import Tokenizer, load_tokenizer
from piecework.engine.text_engine import TextEngine
from piecework.errors import CapacityError, EngineError, RequestError
from tests.unit.engine.letters import LETTERS, write_letters
from tests.unit.engine.paged_model import POSITIONS, PagedModel, alone, make_engine

PROMPT = tuple(range(5, 15))


class SlowModel(PagedModel):
    """Takes some milliseconds a step, so that readers keep up."""

    def run(self, inputs: Mapping[str, Tensor | int]) -> list[Tensor]:
        time.sleep(0.005)
        return super().run(inputs)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_letters(tmp_path)
    return load_tokenizer(tmp_path)


Make = Callable[..., tuple[TextEngine, AsyncEngine, PagedModel]]


@pytest.fixture
def make(tokenizer: Tokenizer) -> Iterator[Make]:
    engines = []

    def make(**options: Any) -> tuple[TextEngine, AsyncEngine, PagedModel]:
        model = SlowModel()
        has_tokenizer = options.pop("has_tokenizer", True)
        engine = AsyncEngine(make_engine(model, **options))
        engines.append(engine)
        return TextEngine(engine, tokenizer if has_tokenizer else None), engine, model

    yield make
    for engine in engines:
        engine.close()


def request(request_id: str = "r", prompt: tuple[int, ...] = PROMPT, **params: Any) -> GenerationRequest:
    return GenerationRequest(request_id, prompt, SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **params}))


def collect(texts: TextEngine, asked: GenerationRequest) -> list[TextDelta]:
    async def read() -> list[TextDelta]:
        texts.check(asked)
        return [delta async for delta in texts.stream(asked)]

    return asyncio.run(read())


def drained(engine: AsyncEngine) -> bool:
    """Wait until nothing runs any more; returns whether all blocks are free then."""
    return engine.drain(20) and engine.stats().kv_blocks_used == 0


def test_the_text_is_that_of_the_tokens(make: Make, tokenizer: Tokenizer) -> None:
    texts, _, _ = make()
    asked = request(n=2, temperature=1.0, seed=3)
    deltas = collect(texts, asked)
    for index in range(2):
        own = [delta for delta in deltas if delta.index == index]
        tokens = alone(asked)["r", index]
        assert [sampled.token for delta in own for sampled in delta.tokens] == tokens
        assert "".join(delta.text for delta in own) == tokenizer.decode(tokens)
        assert [delta.finish_reason for delta in own] == [None] * 11 + [FinishReason.LENGTH]


def test_a_stream_and_a_completion_say_the_same(make: Make, tokenizer: Tokenizer) -> None:
    texts, _, _ = make()
    asked = [request("a", n=2, temperature=1.0, seed=3, logprobs=1), request("b", (7, 8), max_tokens=3)]
    first, second = texts.complete(asked)
    deltas = collect(texts, asked[0])
    for index, made in enumerate(first.continuations):
        own = [delta for delta in deltas if delta.index == index]
        assert made.text == "".join(delta.text for delta in own)
        assert made.logprobs == tuple(sampled for delta in own for sampled in delta.tokens)
        assert made.tokens == tuple(alone(asked[0])["a", index])
        assert made.finish_reason is FinishReason.LENGTH
    assert (first.prompt, second.prompt) == (PROMPT, (7, 8))
    assert (second.text, second.continuations[0].logprobs) == (tokenizer.decode(alone(asked[1])["b", 0]), None)


def test_a_stop_string_ends_one_continuation_and_frees_it(make: Make, tokenizer: Tokenizer) -> None:
    texts, engine, _ = make()
    text = tokenizer.decode(alone(request(max_tokens=40))["r", 0])
    stop = text[7:9]
    deltas = collect(texts, request(max_tokens=40, stop=(stop,)))
    assert "".join(delta.text for delta in deltas) == text[: text.index(stop)]
    assert (deltas[-1].finish_reason, deltas[-1].stop) == (FinishReason.STOP, stop)
    (made,) = texts.complete([request("again", max_tokens=40, stop=(stop,))])
    assert (made.text, made.continuations[0].stop) == (text[: text.index(stop)], stop)
    assert drained(engine)
    assert engine.stats().generated_tokens < 2 * 40


def test_the_other_continuations_go_on_after_one_was_stopped(make: Make, tokenizer: Tokenizer) -> None:
    texts, engine, _ = make()
    asked = request(max_tokens=30, n=3, temperature=1.0, seed=5)
    whole = [tokenizer.decode(alone(asked)["r", index]) for index in range(3)]
    stop = next(pair for i in range(5, 25) if (pair := whole[1][i : i + 2]) not in whole[0] and pair not in whole[2])
    (made,) = texts.complete([request(max_tokens=30, n=3, temperature=1.0, seed=5, stop=(stop,))])
    assert [c.text for c in made.continuations] == [whole[0], whole[1][: whole[1].index(stop)], whole[2]]
    assert [c.finish_reason.value for c in made.continuations] == ["length", "stop", "length"]
    assert drained(engine)


def test_log_probabilities_come_with_their_tokens(make: Make) -> None:
    texts, _, _ = make()
    deltas = collect(texts, request(logprobs=2, prompt_logprobs=1))
    for delta in deltas:
        (sampled,) = delta.tokens
        assert sampled.logprob is not None
        assert sampled.top[0][1] >= sampled.top[1][1]
        assert len(sampled.top) == 2
    scores = deltas[0].prompt_logprobs
    assert scores is not None
    assert [score and score.token for score in scores] == [None, *PROMPT[1:]]
    assert all(delta.prompt_logprobs is None for delta in deltas[1:])
    (made,) = texts.complete([request("again", logprobs=2, prompt_logprobs=1)])
    assert made.prompt_logprobs == scores


def test_whoever_stops_listening_frees_the_blocks(make: Make) -> None:
    texts, engine, _ = make()

    async def leave() -> None:
        async with aclosing(texts.stream(request(max_tokens=80))) as deltas:
            async for _ in deltas:
                break

    asyncio.run(leave())
    assert drained(engine)
    assert engine.stats().generated_tokens < 80


def test_what_can_never_run_is_refused_before_anything_does(make: Make) -> None:
    texts, engine, _ = make(num_blocks=6)
    for asked, error in (
        (request("x", (5,) * POSITIONS), RequestError),
        (request("x", (5, 1000)), RequestError),
        (request("x", logit_bias={1000: 1.0}), RequestError),
        (request("x", max_tokens=60), CapacityError),
    ):
        with pytest.raises(error):
            texts.check(asked)
        with pytest.raises(error):
            texts.complete([request("good"), asked])
    assert engine.stats().steps == 0


def test_the_longest_sequence_is_what_model_and_cache_take(make: Make) -> None:
    assert make(num_blocks=1000)[0].max_positions == POSITIONS
    texts, _, model = make(num_blocks=4)
    assert texts.max_positions == 4 * model.block_size


def test_a_failing_engine_is_told_to_all_and_stays_failed(make: Make) -> None:
    texts, _, model = make()
    assert texts.failure == ""
    model.fail = ValueError("broken")
    with pytest.raises(EngineError, match="broken"):
        collect(texts, request())
    assert texts.failure == "the engine failed: ValueError: broken"


def test_without_a_tokenizer_there_are_tokens(make: Make) -> None:
    texts, _, _ = make(has_tokenizer=False)
    (made,) = texts.complete([request()])
    assert (made.text, made.tokens) == ("", tuple(alone(request())["r", 0]))
    for use in (
        lambda: texts.encode("a"),
        lambda: texts.decode([5]),
        lambda: texts.encode_chat([{"role": "user", "content": "a"}]),
        lambda: texts.check(request(stop="a")),
    ):
        with pytest.raises(RequestError, match=r"no tokenizer\.json"):
            use()


def test_tokens_have_bytes_as_far_as_the_tokenizer_goes(make: Make, tokenizer: Tokenizer) -> None:
    texts, _, _ = make()
    assert texts.encode("abc") == [0, 1, 3]  # 2 is the end token
    assert b"".join(texts.token_bytes()[token] for token in texts.encode("abc")) == b"abc"
    assert len(texts.token_bytes()) == tokenizer.num_tokens == len(LETTERS) + 1


def test_a_conversation_goes_through_the_template(make: Make, tmp_path: Path) -> None:
    texts, _, _ = make()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    tools = [{"type": "function", "function": {"name": "xyz"}}]
    assert texts.decode(texts.encode_chat([{"role": "user", "content": "hello"}], tools=tools)) == "helloxyz"
