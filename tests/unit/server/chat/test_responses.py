"""/v1/responses with the official client: texts, reasoning, calls, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from piecework.server.settings import ServerSettings
from tests.unit.server.fake import FakeService, ready
from tests.unit.server.live import live_server

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


@pytest.fixture(scope="module")
def talker() -> FakeService:
    service = FakeService()
    service.templates = "<tool_call>"
    return service


@pytest.fixture(scope="module")
def talking(talker: FakeService) -> Iterator[openai.OpenAI]:
    with live_server(ready(talker), ServerSettings(model_names=("m",))) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_an_answer_in_one_piece(talking: openai.OpenAI, talker: FakeService) -> None:
    talker.says = f"<think>Hm.</think>I look.{CALL}"
    answer = talking.responses.create(model="m", input="?", instructions="Be kind.", tools=[TOOL], metadata={"a": "b"})
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    assert (answer.output_text, answer.status, answer.metadata) == ("I look.", "completed", {"a": "b"})
    assert answer.output[0].content[0].text == "Hm."
    assert (answer.output[2].name, json.loads(answer.output[2].arguments)) == ("weather", {"city": "Oslo"})
    assert answer.usage.output_tokens == len(talker.says)
    prompt = talker.decode(talker.seen[-1].prompt)
    assert prompt.startswith("system: Be kind.\nuser: ?\n")


def test_a_conversation_that_goes_on(talking: openai.OpenAI, talker: FakeService) -> None:
    talker.says = "Rain."
    first = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
    talking.responses.create(
        model="m",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "r", "summary": []},
            first,
            {**first, "call_id": "c2"},
            {"type": "function_call_output", "call_id": "c1", "output": "wet"},
        ],
        max_output_tokens=7,
        temperature=0.5,
        text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
    )
    generation = talker.seen[-1]
    assert talker.decode(generation.prompt) == "user: Weather?\nassistant: \ntool: wet\nassistant:"
    assert (generation.params.max_tokens, generation.params.temperature) == (7, 0.5)
    assert generation.params.structured is not None


def test_a_stream_says_the_same_as_the_whole(talking: openai.OpenAI, talker: FakeService) -> None:
    talker.says = f"<think>Hm.</think>I look.{CALL}{CALL}"
    events = list(talking.responses.create(model="m", input="?", tools=[TOOL], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert len(events) >= len(talker.says)  # each token's step is seen
    assert events[-1].type == "response.completed"
    texts = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert texts == events[-1].response.output_text == "I look."
    items = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.type for item in items] == ["reasoning", "message", "function_call", "function_call"]
    assert items == events[-1].response.output
    assert len({item.id for item in items}) == len(items)


def test_what_was_cut_off_is_incomplete(talking: openai.OpenAI, talker: FakeService) -> None:
    talker.says = None
    answer = talking.responses.create(model="m", input="?", max_output_tokens=3)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete"
    last = list(talking.responses.create(model="m", input="?", max_output_tokens=3, stream=True))[-1]
    assert last.type == "response.incomplete"


@pytest.mark.parametrize(
    "more",
    [
        {"previous_response_id": "resp_1"},
        {"input": [{"content": "x"}]},
        {"input": [{"type": "function_call", "call_id": "c"}]},
        {"input": [{"type": "reasoning"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"text": {"format": {"type": "json_schema", "name": "x"}}},
        {"tools": [{"type": "web_search"}]},
        {"tool_choice": {"type": "function", "name": "nothing"}, "tools": [TOOL]},
        {"background": True},
    ],
)
def test_what_cannot_be_done_is_refused(talking: openai.OpenAI, more: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError):
        talking.responses.create(**{"model": "m", "input": "?", **more})
