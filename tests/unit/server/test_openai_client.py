"""The official client against a live server: completions, chat, streams, usage, logprobs, errors."""

from __future__ import annotations

import openai
import pytest

from piecework.server.settings import ServerSettings
from piecework.spec.sampling_defaults import SamplingDefaults
from tests.unit.server.fake import FakeService, ready
from tests.unit.server.live import live_server

MODEL = "fake"


def words(text: str) -> list[str]:
    return text.split()


class TestCompletions:
    def test_a_completion_has_text_usage_and_a_reason(self, client):
        answer = client.completions.create(model=MODEL, prompt="Once", max_tokens=5)
        (choice,) = answer.choices
        assert len(words(choice.text)) == 5
        assert choice.finish_reason == "length"
        assert choice.logprobs is None
        assert answer.object == "text_completion"
        assert answer.model == MODEL
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 5, 9)

    def test_sixteen_tokens_where_nobody_says(self, client):
        assert client.completions.create(model=MODEL, prompt="Once").usage.completion_tokens == 16

    def test_several_prompts_and_n_are_numbered_through(self, client):
        together = client.completions.create(model=MODEL, prompt=["a", "bc"], n=2, max_tokens=3)
        assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
        alone = client.completions.create(model=MODEL, prompt="bc", n=2, max_tokens=3)
        assert [c.text for c in together.choices[2:]] == [c.text for c in alone.choices]
        assert together.choices[0].text != together.choices[1].text
        assert (together.usage.prompt_tokens, together.usage.completion_tokens) == (3, 12)

    def test_prompts_of_token_ids(self, client):
        text = client.completions.create(model=MODEL, prompt="Hi", max_tokens=3).choices[0].text
        assert client.completions.create(model=MODEL, prompt=[72, 105], max_tokens=3).choices[0].text == text
        several = client.completions.create(model=MODEL, prompt=[[72, 105], [72]], max_tokens=3)
        assert several.choices[0].text == text

    def test_a_stream_says_the_same_as_the_whole(self, client):
        asked = {"model": MODEL, "prompt": "Once", "max_tokens": 8, "n": 2}
        whole = client.completions.create(**asked)
        texts, reasons = ["", ""], [None, None]
        for chunk in client.completions.create(**asked, stream=True):
            assert chunk.usage is None
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert texts == [choice.text for choice in whole.choices]
        assert reasons == ["length", "length"]

    def test_a_stream_ends_with_its_usage_where_asked(self, client):
        chunks = list(
            client.completions.create(
                model=MODEL, prompt="Once", max_tokens=3, stream=True, stream_options={"include_usage": True}
            )
        )
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 3

    def test_logprobs(self, client):
        answer = client.completions.create(model=MODEL, prompt="Once", max_tokens=4, logprobs=2)
        logprobs = answer.choices[0].logprobs
        assert "".join(logprobs.tokens) == answer.choices[0].text
        assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 4
        assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs)
        assert all(-9999.0 <= logprob <= 0 for logprob in logprobs.token_logprobs)
        assert logprobs.text_offset[0] == 0
        assert logprobs.text_offset[1] == len(logprobs.tokens[0])

    def test_logprobs_of_a_stream_are_those_of_the_whole(self, client):
        asked = {"model": MODEL, "prompt": "Once", "max_tokens": 6, "logprobs": 1, "echo": True}
        whole = client.completions.create(**asked).choices[0]
        tokens, offsets, text = [], [], ""
        for chunk in client.completions.create(**asked, stream=True):
            text += chunk.choices[0].text
            tokens += chunk.choices[0].logprobs.tokens
            offsets += chunk.choices[0].logprobs.text_offset
        assert (text, tokens, offsets) == (whole.text, whole.logprobs.tokens, whole.logprobs.text_offset)

    def test_a_text_ends_where_the_model_does(self, client, service: FakeService):
        room = service.max_positions - 3
        answer = client.completions.create(model=MODEL, prompt="xyz", max_tokens=99_999, stop="red")
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert service.seen[-1].params.max_tokens == room

    def test_echo_scores_a_text_without_adding_to_it(self, client):
        answer = client.completions.create(model=MODEL, prompt="Hi!", max_tokens=0, echo=True, logprobs=1)
        (choice,) = answer.choices
        assert choice.text == "Hi!"
        assert choice.logprobs.tokens == ["H", "i", "!"]
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.text_offset == [0, 1, 2]
        assert choice.finish_reason == "length"
        assert answer.usage.completion_tokens == 0

    def test_echo_goes_to_every_continuation(self, client):
        asked = {"model": MODEL, "prompt": ["Hi", "Ho!"], "n": 2, "max_tokens": 2, "echo": True, "logprobs": 0}
        whole = client.completions.create(**asked)
        assert [choice.text[:3] for choice in whole.choices] == ["Hi ", "Hi ", "Ho!", "Ho!"]
        assert [len(choice.logprobs.tokens) for choice in whole.choices] == [4, 4, 5, 5]
        texts = ["", "", "", ""]
        for chunk in client.completions.create(**asked, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [choice.text for choice in whole.choices]

    def test_a_stop_string_ends_the_text(self, client):
        full = client.completions.create(model=MODEL, prompt="stop", max_tokens=20).choices[0].text
        stop = words(full)[6]
        choice = client.completions.create(model=MODEL, prompt="stop", max_tokens=20, stop=stop).choices[0]
        assert choice.finish_reason == "stop"
        assert choice.text == full[: full.index(stop)]

    def test_sampling_fields_arrive(self, client, service: FakeService):
        client.completions.create(
            model=MODEL, prompt="x", max_tokens=2, temperature=0.5, top_p=0.9, seed=3, stop=["a", "b"],
            presence_penalty=0.1, frequency_penalty=0.2, logit_bias={"5": -1.5},
            extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": True,
                        "stop_token_ids": [7], "structured_outputs": {"regex": "a+"}},
        )  # fmt: skip
        params = service.seen[-1].params
        assert (params.temperature, params.top_p, params.seed, params.stop) == (0.5, 0.9, 3, ("a", "b"))
        assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (0.1, 0.2, {5: -1.5})
        assert (params.top_k, params.min_p, params.repetition_penalty, params.min_tokens) == (4, 0.1, 1.1, 1)
        assert (params.ignore_eos, params.stop_token_ids, params.structured.regex) == (True, (7,), "a+")

    def test_temperature_is_one_where_nobody_says(self, client, service: FakeService):
        client.completions.create(model=MODEL, prompt="x", max_tokens=1)
        assert service.seen[-1].params.temperature == 1.0

    def test_what_the_model_says_where_nobody_says(self):
        defaults = SamplingDefaults(temperature=0.6, top_k=20, max_tokens=3, repetition_penalty=1.1)
        service = FakeService()
        settings = ServerSettings(model_names=(MODEL,), defaults=defaults, seed=7)
        with live_server(ready(service), settings) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
            for _ in range(2):
                client.completions.create(model=MODEL, prompt="x", temperature=0.0)
            client.completions.create(model=MODEL, prompt="x", seed=1, extra_body={"top_k": 5})
        first, second, last = (seen.params for seen in service.seen)
        assert (first.temperature, first.top_k, first.max_tokens, first.repetition_penalty) == (0.0, 20, 3, 1.1)
        assert [one.seed for one in (first, second, last)] == [7, 8, 1]
        assert (last.temperature, last.top_k) == (0.6, 5)

    def test_log_probabilities_of_the_prompt(self, client):
        asked = {"model": MODEL, "max_tokens": 1, "extra_body": {"prompt_logprobs": 2}}
        whole = client.completions.create(prompt="ab", **asked)
        first, second = whole.choices[0].prompt_logprobs
        assert first is None
        assert list(second) == ["98", *list(second)[1:]]
        assert (second["98"]["decoded_token"], second["98"]["rank"]) == ("b", None)
        chat = client.chat.completions.create(messages=[{"role": "user", "content": "x"}], **asked)
        assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens
        assert chat.choices[0].logprobs is whole.choices[0].logprobs is None
        with pytest.raises(openai.BadRequestError):
            client.completions.create(prompt="ab", stream=True, **asked)


class TestChat:
    def test_an_answer_has_a_message(self, client):
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_completion_tokens=4
        )
        (choice,) = answer.choices
        assert answer.object == "chat.completion"
        assert choice.message.role == "assistant"
        assert len(words(choice.message.content)) == 4
        assert choice.finish_reason == "length"
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 4

    def test_a_stream_says_who_speaks_then_the_text_then_why_it_ends(self, client):
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "n": 2}
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        for index in (0, 1):
            own = [c for chunk in chunks for c in chunk.choices if c.index == index]
            assert own[0].delta.role == "assistant"
            assert "".join(c.delta.content or "" for c in own) == whole.choices[index].message.content
            assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + ["length"]
        assert chunks[-1].usage.completion_tokens == 10

    def test_the_length_defaults_to_what_fits(self, client, service: FakeService):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], stop=["red"])
        generation = service.seen[-1]
        assert generation.params.max_tokens == service.max_positions - len(generation.prompt)

    def test_logprobs(self, client):
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=3, logprobs=True, top_logprobs=2
        )
        content = answer.choices[0].logprobs.content
        assert "".join(entry.token for entry in content) == answer.choices[0].message.content
        assert bytes(content[0].bytes).decode() == content[0].token
        assert [len(entry.top_logprobs) for entry in content] == [2, 2, 2]

    def test_tools_and_template_arguments_reach_the_template(self, client, service: FakeService):
        tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "?"}], "max_tokens": 1, "tools": [tool]}
        client.chat.completions.create(**asked, extra_body={"chat_template_kwargs": {"thinking": False}})
        prompt = service.decode(service.seen[-1].prompt)
        assert '"weather"' in prompt
        assert "thinking: false" in prompt
        client.chat.completions.create(**asked, tool_choice="none")
        assert "weather" not in service.decode(service.seen[-1].prompt)

    def test_earlier_calls_and_parts_of_text(self, client, service: FakeService):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        client.chat.completions.create(
            model=MODEL,
            max_tokens=1,
            messages=[
                {"role": "developer", "content": "be kind"},
                {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": "42"},
            ],
        )
        prompt = service.decode(service.seen[-1].prompt)
        assert prompt == "system: be kind\nuser: one\ntwo\nassistant: \ntool: 42\nassistant:"

    @pytest.mark.parametrize(
        ("response_format", "found"),
        [
            ({"type": "text"}, None),
            ({"type": "json_object"}, ("json_object", "")),
            (
                {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
                ("json_schema", '{"type": "object"}'),
            ),
        ],
    )
    def test_response_format(self, client, service: FakeService, response_format, found):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=1, response_format=response_format
        )
        structured = service.seen[-1].params.structured
        assert (structured.key if structured else None) == found


class TestModels:
    def test_list_and_retrieve(self, client):
        assert [model.id for model in client.models.list()] == [MODEL, "alias/with-slash"]
        assert client.models.retrieve("alias/with-slash").owned_by == "piecework"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("another")

    def test_every_name_works(self, client):
        assert client.completions.create(model="alias/with-slash", prompt="x", max_tokens=1).model == MODEL


class TestErrors:
    @pytest.mark.parametrize(
        ("asked", "param", "code"),
        [
            ({"prompt": "x" * 3000}, "prompt", "context_length_exceeded"),
            ({"prompt": ""}, "prompt", None),
            ({"prompt": []}, "prompt", None),
            ({"prompt": "x", "temperature": -1}, "temperature", None),
            ({"prompt": "x", "temperature": "warm"}, "temperature", None),
            ({"prompt": "x", "max_tokens": "5"}, "max_tokens", None),
            ({"prompt": "x", "max_tokens": True}, "max_tokens", None),
            ({"prompt": "x", "max_tokens": 0}, "max_tokens", None),
            ({"prompt": "x", "n": 0}, "n", None),
            ({"prompt": "x", "n": 17}, "n", None),
            ({"prompt": "x", "logprobs": 21}, "logprobs", None),
            ({"prompt": "x", "best_of": 3}, "best_of", None),
            ({"prompt": "x", "suffix": "y"}, "suffix", None),
            ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", None),
            ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias.a", None),
            ({"prompt": "x", "logit_bias": {"99999": 1}}, None, None),
            ({"prompt": [99999]}, None, None),
            ({"prompt": "x", "extra_body": {"min_tokens": 50}}, "min_tokens", None),
            ({"prompt": "x", "extra_body": {"structured_outputs": {"json": {}, "regex": "a"}}},
             "structured_outputs", None),
        ],
    )  # fmt: skip
    def test_a_wrong_completion_names_the_field(self, client, asked, param, code):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, **asked)
        assert caught.value.type == "invalid_request_error"
        assert caught.value.param == param
        assert code is None or caught.value.code == code
        assert caught.value.body["message"]

    @pytest.mark.parametrize(
        ("asked", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
            ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
                "messages[0].content",
            ),
            ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
            ({"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}, "tool_choice"),
            ({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "xml"}},
             "response_format.type"),
            ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages"),
            ({"messages": [{"role": "function", "name": "f", "content": "the template refuses this"}]}, None),
        ],
    )  # fmt: skip
    def test_a_wrong_chat_names_the_field(self, client, asked, param):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, **asked)
        assert caught.value.param == param

    def test_an_unknown_model(self, client):
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="gpt", prompt="x")
        assert caught.value.code == "model_not_found"
        assert "fake" in str(caught.value)

    def test_a_failure_in_the_middle_of_a_stream_is_an_error_of_the_client(self, client, service: FakeService):
        service.fail_after = 2
        try:
            stream = client.completions.create(model=MODEL, prompt="x", max_tokens=9, stream=True)
            with pytest.raises(openai.APIError, match="failed while generating"):
                list(stream)
            with pytest.raises(openai.InternalServerError, match="did not expect"):
                client.completions.create(model=MODEL, prompt="x", max_tokens=9)
        finally:
            service.fail_after = None
        assert service.active == set()
