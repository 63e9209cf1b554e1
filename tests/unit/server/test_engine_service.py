"""The engine behind the HTTP layer: the real scheduler, sampler and texts, over a made-up model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import httpx
import openai
import pytest

from piecework.engine.async_engine import AsyncEngine
from piecework.engine.engine import TokenOutput
from piecework.engine.request import GenerationRequest
from piecework.engine.sampling_params import SamplingParams
from piecework.engine.text.tokenizer import Tokenizer, load_tokenizer
from piecework.errors import CapacityError, EngineError, RequestError
from piecework.server.engine_service import EngineService
from piecework.server.service import Delta, Generation
from piecework.server.settings import ServerSettings
from tests.unit.engine.paged_model import POSITIONS, PagedModel, alone, make_engine
from tests.unit.server.fake import ready
from tests.unit.server.letters import write_letters
from tests.unit.server.live import eventually, live_server

PROMPT = tuple(range(5, 15))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_letters(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.fixture
def make(tokenizer: Tokenizer) -> Iterator[Callable[..., tuple[EngineService, AsyncEngine, PagedModel]]]:
    engines = []

    def make(**options: int) -> tuple[EngineService, AsyncEngine, PagedModel]:
        model = PagedModel()
        engine = AsyncEngine(make_engine(model, **options))
        engines.append(engine)
        return EngineService(engine, tokenizer, max_positions=POSITIONS), engine, model

    yield make
    for engine in engines:
        engine.close()


def _generation(request_id: str = "r", prompt: tuple[int, ...] = PROMPT, **params: object) -> Generation:
    given = {"max_tokens": 12, "ignore_eos": True, **params}
    return Generation(request_id, prompt, SamplingParams(**given))


def _collect(service: EngineService, generation: Generation) -> list[Delta]:
    async def collect() -> list[Delta]:
        await service.check(generation)
        return [delta async for delta in service.stream(generation)]

    return asyncio.run(collect())


def _expected(generation: Generation) -> dict[tuple[str, int], list[int]]:
    return alone(GenerationRequest(generation.request_id, generation.prompt, generation.params))


def test_the_text_is_that_of_the_tokens(make, tokenizer):
    service, _, _ = make()
    generation = _generation(n=2, temperature=1.0, seed=3)
    deltas = _collect(service, generation)
    for index in range(2):
        own = [delta for delta in deltas if delta.index == index]
        tokens = _expected(generation)["r", index]
        assert [delta.tokens for delta in own] == [(token,) for token in tokens]
        assert "".join(delta.text for delta in own) == tokenizer.decode(tokens)
        assert [delta.finish_reason for delta in own] == [None] * 11 + ["length"]


def test_a_stop_string_ends_one_continuation_and_frees_it(make, tokenizer):
    service, engine, _ = make()
    generation = _generation(max_tokens=40)
    text = tokenizer.decode(_expected(generation)["r", 0])
    stop = text[7:9]
    deltas = _collect(service, _generation(max_tokens=40, stop=(stop,)))
    assert "".join(delta.text for delta in deltas) == text[: text.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    assert eventually(lambda: engine.stats().running == 0)
    assert engine.stats().kv_blocks_used == 0


def test_log_probabilities_name_tokens_and_their_bytes(make, tokenizer):
    service, _, _ = make()
    deltas = _collect(service, _generation(logprobs=2, prompt_logprobs=1))
    for delta in deltas:
        (entry,) = delta.logprobs
        assert entry.chosen.token == delta.tokens[0]
        assert entry.chosen.raw.decode() == entry.chosen.text == delta.text
        assert len(entry.top) == 2
        assert entry.top[0].logprob >= entry.top[1].logprob
    scores = deltas[0].prompt_logprobs
    assert scores is not None
    assert scores[0] is None
    assert "".join(entry.chosen.text for entry in scores[1:]) == tokenizer.decode(PROMPT[1:])
    assert all(delta.prompt_logprobs is None for delta in deltas[1:])


def test_whoever_stops_listening_frees_the_blocks(make):
    service, engine, _ = make()

    async def leave() -> None:
        async with aclosing(service.stream(_generation(max_tokens=80))) as deltas:
            async for _ in deltas:
                break

    asyncio.run(leave())
    assert eventually(lambda: engine.stats().kv_blocks_used == 0)
    assert engine.stats().generated_tokens < 80


def test_what_can_never_run_is_refused_before_it_does(make):
    service, _, _ = make(num_blocks=4)
    for generation, error in (
        (_generation(prompt=(5,) * POSITIONS), RequestError),
        (_generation(prompt=(5, 1000)), RequestError),
        (_generation(logit_bias={1000: 1.0}), RequestError),
        (_generation(max_tokens=60), CapacityError),
    ):
        with pytest.raises(error):
            asyncio.run(service.check(generation))


def test_a_failing_engine_is_told_to_all_and_stays_failed(make):
    service, _, model = make()
    assert service.failure == ""
    model.fail = ValueError("broken")
    with pytest.raises(EngineError, match="broken"):
        _collect(service, _generation())
    assert service.failure == "the engine failed: ValueError: broken"


def test_over_http_with_a_mixed_load_and_leavers(make, tokenizer):
    """Twenty clients, a third of which leave; the rest get what they'd get alone, and no block is lost."""
    service, engine, _ = make(num_blocks=30)  # few, so that some are preempted

    async def clients(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(one(client, index) for index in range(20)))

    async def one(client: openai.AsyncOpenAI, index: int) -> str:
        asked = {"model": "m", "prompt": [5 + index % 7] * (1 + index), "max_tokens": 20, "temperature": 0}
        stream = await client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].text
            if index % 3 == 0:
                await stream.close()
                return "left"
        return text

    with live_server(ready(service), ServerSettings(model_names=("m",))) as url:
        texts = asyncio.run(clients(url))
        assert eventually(lambda: engine.stats().running == engine.stats().waiting == 0)
        assert engine.stats().kv_blocks_used == 0
        assert engine.stats().preemptions > 0
        for index, text in enumerate(texts):
            expected = _expected(_generation(prompt=(5 + index % 7,) * (1 + index), max_tokens=20))["r", 0]
            assert text == ("left" if index % 3 == 0 else tokenizer.decode(expected))


def test_chat_over_http_goes_through_the_template(make):
    service, _, _ = make()
    tool = {"type": "function", "function": {"name": "abc"}}
    asked = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "temperature": 0}
    with live_server(ready(service), ServerSettings(model_names=("m",))) as url:
        plain = httpx.post(
            f"{url}/v1/completions", json={"model": "m", "prompt": "helloabc", "max_tokens": 3, "temperature": 0}
        )
        chat = httpx.post(f"{url}/v1/chat/completions", json={**asked, "tools": [tool]})
        assert chat.json()["choices"][0]["message"]["content"] == plain.json()["choices"][0]["text"]
        assert chat.json()["usage"]["prompt_tokens"] == 8
        refused = httpx.post(
            f"{url}/v1/chat/completions", json={**asked, "messages": [{"role": "user", "content": ""}]}
        )
        assert refused.status_code == 400


class OneTokenEngine:
    """Gives a token that the tokenizer doesn't have, as a model with a padded vocabulary can."""

    error = None

    def check(self, request: GenerationRequest) -> None: ...

    def abort(self, request_id: str, index: int | None = None) -> None: ...

    async def stream(self, request: GenerationRequest):
        from piecework.engine.request import FinishReason
        from piecework.engine.sampling.sampler import SampledToken

        yield TokenOutput(request.request_id, 0, SampledToken(99, -1.0, ((99, -1.0),)), FinishReason.LENGTH)


def test_a_token_that_the_tokenizer_lacks_has_no_text(tokenizer):
    (delta,) = _collect(EngineService(OneTokenEngine(), tokenizer, max_positions=8), _generation(logprobs=1))
    assert (delta.text, delta.logprobs[0].chosen.raw) == ("", b"")
