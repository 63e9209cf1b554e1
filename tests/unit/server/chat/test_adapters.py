"""LangChain's and LiteLLM's adapters for OpenAI, unmodified, against a live server; skipped where they aren't there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from piecework.engine.request import GenerationRequest
from piecework.engine.text.deltas import TextDelta
from piecework.server.settings import ServerSettings
from tests.unit.server.fake import FakeService, ready
from tests.unit.server.live import live_server

pytestmark = pytest.mark.slow

ARGUMENTS = {"city": "Oslo"}
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "?", "parameters": PARAMETERS}}


class Obedient(FakeService):
    """Says what it is constrained to, calls the tool that it is told of, and else words."""

    async def stream(self, generation: GenerationRequest) -> AsyncIterator[TextDelta]:
        structured = generation.params.structured
        if structured is not None:
            self.says = f"[{CALL}]" if '"array"' in structured.key[1] else '{"city": "Oslo"}'
        else:
            self.says = f"<tool_call>{CALL}</tool_call>" if "weather" in self.decode(generation.prompt) else None
        async for delta in super().stream(generation):
            yield delta


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    service = Obedient()
    service.templates = "<tool_call>"
    with live_server(ready(service), ServerSettings(model_names=("m",))) as url:
        yield f"{url}/v1"


def test_langchain(base: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model: Any = langchain.ChatOpenAI(base_url=base, api_key="x", model="m", temperature=0, max_tokens=90)
    assert len(model.invoke("Hello").content.split()) == 90
    assert len(list(model.stream("Hello"))) >= 90
    for choice in (None, "any", "weather"):
        (call,) = model.bind_tools([WEATHER], tool_choice=choice).invoke("?").tool_calls
        assert (call["name"], call["args"]) == ("weather", ARGUMENTS)
    for method in ("function_calling", "json_schema", "json_mode"):
        shape = {"title": "weather", "description": "?", **PARAMETERS}
        assert model.with_structured_output(shape, method=method).invoke("?") == ARGUMENTS
    newer: Any = langchain.ChatOpenAI(base_url=base, api_key="x", model="m", max_tokens=90, use_responses_api=True)
    assert len(newer.invoke("Hello").content[0]["text"].split()) == 90


def test_litellm(base: str) -> None:
    litellm: Any = pytest.importorskip("litellm")
    where = {"api_base": base, "api_key": "x"}
    talk = {"model": "openai/m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 90, **where}
    assert len(litellm.completion(**talk).choices[0].message.content.split()) == 90
    assert len(list(litellm.completion(**talk, stream=True))) >= 90
    (call,) = litellm.completion(**talk, tools=[WEATHER], tool_choice="required").choices[0].message.tool_calls
    assert call.function.name == "weather"
    plain = {"model": "text-completion-openai/m", "prompt": "Hello", "max_tokens": 90, **where}
    assert len(litellm.text_completion(**plain).choices[0].text.split()) == 90
    assert litellm.responses(model="openai/m", input="Hello", max_output_tokens=90, **where).output[0].type == "message"
