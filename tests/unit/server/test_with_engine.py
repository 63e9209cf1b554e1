"""A server with the real engine behind it, over a made-up model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from piecework.engine.async_engine import AsyncEngine
from piecework.engine.request import GenerationRequest
from piecework.engine.sampling_params import SamplingParams
from piecework.engine.text.tokenizer import Tokenizer, load_tokenizer
from piecework.engine.text_engine import TextEngine
from piecework.server.settings import ServerSettings
from tests.unit.engine.letters import write_letters
from tests.unit.engine.paged_model import PagedModel, alone, make_engine
from tests.unit.server.fake import ready
from tests.unit.server.live import eventually, live_server


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_letters(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.fixture
def make(tokenizer: Tokenizer) -> Iterator[Callable[..., tuple[TextEngine, AsyncEngine]]]:
    engines = []

    def make(**options: int) -> tuple[TextEngine, AsyncEngine]:
        engine = AsyncEngine(make_engine(PagedModel(), **options))
        engines.append(engine)
        return TextEngine(engine, tokenizer), engine

    yield make
    for engine in engines:
        engine.close()


def test_over_http_with_a_mixed_load_and_leavers(make, tokenizer):
    """Twenty clients, a third of which leave; the rest get what they'd get alone, and no block is lost."""
    service, engine = make(num_blocks=30)  # few, so that some are preempted

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
            params = SamplingParams(max_tokens=20, ignore_eos=True)
            expected = alone(GenerationRequest("r", (5 + index % 7,) * (1 + index), params))["r", 0]
            assert text == ("left" if index % 3 == 0 else tokenizer.decode(expected))


def test_chat_over_http_goes_through_the_template(make):
    service, _ = make()
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


def test_a_token_that_the_tokenizer_lacks_has_no_text_and_no_bytes(tmp_path):
    """A model's vocabulary may be padded: here the tokenizer has 4 of the model's 40 tokens."""
    write_letters(tmp_path, num_letters=3)
    engine = AsyncEngine(make_engine(PagedModel()))
    asked = {"model": "m", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 8, "temperature": 0}
    try:
        service = TextEngine(engine, load_tokenizer(tmp_path))
        with live_server(ready(service), ServerSettings(model_names=("m",))) as url:
            answer = httpx.post(f"{url}/v1/chat/completions", json={**asked, "logprobs": True, "ignore_eos": True})
            (choice,) = answer.json()["choices"]
            # whoever measures the time to the first token sees each one, with text or without
            plain = {"model": "m", "prompt": [0, 1, 3], "max_tokens": 8, "temperature": 0, "stream": True}
            chunks = httpx.post(f"{url}/v1/completions", json={**plain, "ignore_eos": True}).text.split("\n\n")[:-2]
            assert len(chunks) == 8
            talk = httpx.post(f"{url}/v1/chat/completions", json={**asked, "stream": True, "ignore_eos": True}).text
            assert talk.count("data: {") >= 8 + 1  # and who speaks
    finally:
        engine.close()
    entries = choice["logprobs"]["content"]
    tokens = alone(GenerationRequest("r", (0, 1, 3), SamplingParams(max_tokens=8, ignore_eos=True)))["r", 0]
    lacking = [entry for entry, token in zip(entries, tokens, strict=True) if token >= 4]
    assert lacking
    assert all((entry["token"], entry["bytes"]) == ("", []) for entry in lacking)
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
