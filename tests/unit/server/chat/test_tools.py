"""Tools over HTTP, with the official client: choices, calls, reasoning, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from piecework.engine.sampling.grammars import Grammar, Grammars
from piecework.server.messages.dialect import find_dialect, known_dialects
from piecework.server.messages.tool_use import tool_use
from piecework.server.requests import ChatRequest
from piecework.server.settings import ServerSettings
from tests.unit.engine import tokenizers_of_tests as small
from tests.unit.server.fake import FakeService, ready
from tests.unit.server.live import live_server

PARAMETERS = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "$defs": {"city": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": False}},
    {"type": "function", "function": {"name": "time"}},
]
ASKED: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "?"}], "tools": TOOLS}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


@pytest.fixture(scope="module")
def service() -> FakeService:
    service = FakeService()
    service.templates = "<tool_call>"
    return service


@pytest.fixture
def plain_url() -> Iterator[str]:
    with live_server(ready(FakeService()), ServerSettings(model_names=("fake",))) as url:
        yield url


@pytest.fixture(scope="module")
def client(service: FakeService) -> Iterator[openai.OpenAI]:
    with live_server(ready(service), ServerSettings(model_names=("m",))) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def streamed(client: openai.OpenAI, **asked: Any) -> tuple[dict[str, str], list[list[str]], str, int]:
    """Return texts by field, calls as [id, name, arguments], why it ended, and the number of chunks."""
    texts = {"content": "", "reasoning_content": ""}
    calls: list[list[str]] = []
    ended, count = "", 0
    for chunk in client.chat.completions.create(**asked, stream=True):
        (choice,), count = chunk.choices, count + 1
        for field in texts:
            texts[field] += getattr(choice.delta, field, None) or ""
        for call in choice.delta.tool_calls or ():
            if call.id:
                calls.append([call.id, call.function.name, ""])
            calls[call.index][2] += call.function.arguments
        ended = choice.finish_reason or ended
    return texts, calls, ended, count


def test_calls_reasoning_and_text_are_told_apart(client: openai.OpenAI, service: FakeService) -> None:
    service.says = f"<think>\nHm.</think>\n\nI look.{CALL}{CALL.replace('weather', 'time')}"
    whole = client.chat.completions.create(**ASKED)
    (choice,) = whole.choices
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content, choice.message.reasoning_content) == ("I look.", "Hm.")
    assert [call.function.name for call in choice.message.tool_calls] == ["weather", "time"]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    assert len({call.id for call in choice.message.tool_calls}) == 2
    texts, calls, ended, count = streamed(client, **ASKED)
    assert texts == {"content": "I look.", "reasoning_content": "Hm."}
    assert [(name, json.loads(arguments)) for _, name, arguments in calls] == [
        ("weather", {"city": "Oslo"}),
        ("time", {"city": "Oslo"}),
    ]
    assert ended == "tool_calls"
    assert count >= len(service.says)  # each token's step is seen, those inside of a mark too


def test_only_one_call_where_only_one_is_wanted(client: openai.OpenAI, service: FakeService) -> None:
    service.says = CALL + CALL
    whole = client.chat.completions.create(**ASKED, parallel_tool_calls=False)
    assert len(whole.choices[0].message.tool_calls) == 1
    assert whole.choices[0].message.content is None
    assert len(streamed(client, **ASKED, parallel_tool_calls=False)[1]) == 1


def test_without_tools_nothing_is_called(client: openai.OpenAI, service: FakeService) -> None:
    service.says = CALL
    choice = client.chat.completions.create(**ASKED, tool_choice="none").choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")


def test_a_named_choice_constrains_the_arguments(client: openai.OpenAI, service: FakeService) -> None:
    service.says = '{"city": "Oslo"}'
    asked = {**ASKED, "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    (choice,) = client.chat.completions.create(**asked).choices
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert [(c.function.name, c.function.arguments) for c in choice.message.tool_calls] == [("weather", service.says)]
    assert json.loads(service.seen[-1].params.structured.key[1]) == PARAMETERS
    _, calls, ended, _ = streamed(client, **asked)
    assert ([call[1:] for call in calls], ended) == ([["weather", service.says]], "tool_calls")


def test_a_required_call_constrains_the_text_to_calls(client: openai.OpenAI, service: FakeService) -> None:
    service.says = '[{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "time", "arguments": {}}]'
    asked = {**ASKED, "tool_choice": "required"}
    (choice,) = client.chat.completions.create(**asked).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["weather", "time"]
    schema = json.loads(service.seen[-1].params.structured.key[1])
    assert (schema["$defs"], len(schema["items"]["anyOf"])) == (PARAMETERS["$defs"], 2)
    assert [call[1] for call in streamed(client, **asked)[1]] == ["weather", "time"]


STRICT = {"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}


@pytest.mark.parametrize(
    ("template", "before", "begin", "end"),
    [
        ("<tool_call>", "Hm: {", '<tool_call>\n{"name": "weather", "arguments": ', "}\n</tool_call>"),
        ("<|python_tag|>", "", '{"name": "weather", "parameters": ', "}"),
    ],
)
def test_strict_functions_hold_the_model_to_their_schemas_wherever_it_calls(
    template: str, before: str, begin: str, end: str
) -> None:
    pytest.importorskip("llguidance")
    (dialect,) = [find_dialect(known_dialects(), template)]
    tools = [STRICT, {"type": "function", "function": {"name": "any"}}]
    body = ChatRequest.model_validate({**ASKED, "tools": tools})
    constraint = tool_use(body, dialect).constraint
    assert constraint is not None
    tokenizer = small.byte_level()
    grammars = Grammars(tokenizer, vocab_size=400, eos_token_ids=(small.EOS,))
    for text, right in (
        ("Just text.", True),
        (before + begin + '{"city": "Oslo"}' + end, True),
        (before + begin + '{"city": 5}' + end, False),
        (before + begin.replace("weather", "any") + '{"city": 5}' + end, True),
        (before + begin.replace("weather", "other"), False),
    ):
        assert follows(grammars.start(constraint), tokenizer.encode(text)) is right, text


def follows(grammar: Grammar, tokens: list[int]) -> bool:
    """Return whether a grammar allows these tokens, and then the end."""
    mask = np.zeros(13, dtype=np.int32)
    for place in range(len(tokens) + 1):
        grammar.fill(mask, tokens[:place])
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")
        if not allowed[[*tokens, small.EOS][place]]:
            return False
    return True


def test_strict_functions_are_refused_where_nothing_holds_the_model_to_them(plain_url: str) -> None:
    asked = {**ASKED, "model": "fake", "tools": [STRICT]}
    answer = httpx.post(f"{plain_url}/v1/chat/completions", json=asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize(
    "more",
    [
        {"tool_choice": {"type": "function", "function": {"name": "nothing"}}},
        {"tool_choice": "required", "response_format": {"type": "json_object"}},
        {"tool_choice": "required", "tools": []},
        {
            "tool_choice": "required",
            "tools": [
                {"type": "function", "function": {"name": name, "parameters": {"$defs": {"a": {"const": name}}}}}
                for name in ("f", "g")
            ],
        },
    ],
)
def test_choices_that_cannot_be_made_are_refused(client: openai.OpenAI, more: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**{**ASKED, **more})


def test_a_prompt_may_have_opened_the_reasoning(client: openai.OpenAI, service: FakeService) -> None:
    service.says = "Hm.</think>Yes."
    asked = {**ASKED, "messages": [{"role": "user", "content": "?"}], "tools": []}
    plain = client.chat.completions.create(**asked).choices[0].message
    assert plain.content == "Hm.</think>Yes."
    kept, service.prompt_end = service.prompt_end, "<think>\n"
    try:
        message = client.chat.completions.create(**asked).choices[0].message
    finally:
        service.prompt_end = kept
    assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")
