"""What goes over the wire, field for field: which are null, which are left out; and that the schema says the same."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema_rs
import pytest

WORDS = {"model": "fake", "prompt": "Once", "max_tokens": 2, "logprobs": 1}
TALK = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return _without_names(httpx.post(f"{url}{path}", json=body).json())


def stream(url: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = httpx.post(f"{url}{path}", json={**body, "stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [_without_names(json.loads(line.removeprefix("data: "))) for line in lines[:-2]]


def _without_names(answer: dict[str, Any]) -> dict[str, Any]:
    """Leave out what differs between two requests, and what all answers and chunks have."""
    assert answer.pop("id").startswith(("cmpl-", "chatcmpl-"))
    assert answer.pop("created") > 0
    assert answer.pop("model") == "fake"
    return answer


def test_a_completion(url: str) -> None:
    whole = post(url, "/v1/completions", WORDS)
    assert whole == {
        "object": "text_completion",
        "choices": [
            {
                "index": 0,
                "text": " four grün",
                "logprobs": {
                    "tokens": [" four", " grün"],
                    "token_logprobs": [-0.25, -0.25],
                    "top_logprobs": [{" green": -0.5, " four": -0.25}, {" two": -0.5, " grün": -0.25}],
                    "text_offset": [0, 5],
                },
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 2,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_chunks_of_a_completion_have_usage_only_where_it_is_asked_for(url: str) -> None:
    plain = {**WORDS, "logprobs": None}
    texts = [(" four", None), (" grün", "length")]
    chunks = [
        {
            "object": "text_completion",
            "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}],
        }
        for text, reason in texts
    ]
    assert stream(url, "/v1/completions", plain) == chunks
    *first, last = stream(url, "/v1/completions", {**plain, **USAGE})
    assert first == [{**chunk, "usage": None} for chunk in chunks]
    usage = post(url, "/v1/completions", plain)["usage"]
    assert last == {"object": "text_completion", "choices": [], "usage": usage}


def test_a_message(url: str) -> None:
    whole = post(url, "/v1/chat/completions", TALK)
    (choice,) = whole["choices"]
    text = choice["message"].pop("content")
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }
    first, *middle, last = [chunk["choices"][0] for chunk in stream(url, "/v1/chat/completions", TALK)]
    quiet = {"index": 0, "logprobs": None, "finish_reason": None}
    assert first == {**quiet, "delta": {"role": "assistant", "content": ""}}
    said = [delta.pop("delta") for delta in middle]
    assert middle == [quiet, quiet]
    assert [list(delta) for delta in said] == [["content"], ["content"]]
    assert "".join(delta["content"] for delta in said) == text
    assert last == {**quiet, "delta": {}, "finish_reason": "length"}


@pytest.mark.parametrize("more", [{}, {"n": 2, "stop": "red"}, USAGE, {"logprobs": 2, "echo": True}])
@pytest.mark.parametrize(("path", "schema"), [("completions", "CompletionChunk"), ("chat/completions", "ChatChunk")])
def test_every_chunk_is_as_the_schema_says(url: str, path: str, schema: str, more: dict[str, Any]) -> None:
    openapi = httpx.get(f"{url}/openapi.json").json()
    validator = jsonschema_rs.validator_for(
        {"$ref": f"#/components/schemas/{schema}", "components": openapi["components"]}
    )
    body = {**(WORDS if path == "completions" else TALK), "max_tokens": 30, **more}
    if path != "completions" and "logprobs" in more:
        body = {**body, "logprobs": True, "top_logprobs": 2, "echo": None}
    text = httpx.post(f"{url}/v1/{path}", json={**body, "stream": True}).text
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    assert len(chunks) > 2
    for chunk in chunks:
        validator.validate(chunk)
    with pytest.raises(jsonschema_rs.ValidationError):
        validator.validate({**chunks[0], "more": 1})
