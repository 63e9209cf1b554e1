from __future__ import annotations

from typing import Any

import pytest

from piecework.bench.serving.answers import AnswerError, StreamedAnswer, error_message
from tests.unit.bench.serving.stub_server import DONE, event, text_event, usage_event


def read(*parts: bytes) -> StreamedAnswer:
    answer = StreamedAnswer()
    for seconds, part in enumerate(parts):
        answer.feed(part, seconds=float(seconds))
    answer.end()
    return answer


def test_a_completion() -> None:
    answer = read(text_event("a"), text_event("b") + text_event(""), text_event("c", finish_reason="stop"), DONE)
    assert answer.token_s == [0.0, 1.0, 1.0, 2.0]
    assert (answer.input_tokens, answer.output_tokens) == (None, None)


def test_the_servers_count() -> None:
    answer = read(text_event("a", finish_reason="length"), usage_event(12, 3), DONE)
    assert (answer.input_tokens, answer.output_tokens) == (12, 3)


def test_events_in_pieces_and_with_characters_that_look_like_ends_of_lines() -> None:
    data = text_event("a\u2028b\x85c\x0bd") + b": a comment\r\n\r\n" + text_event("e", finish_reason="stop") + DONE
    for size in (1, 2, 7, len(data)):
        parts = [data[at : at + size] for at in range(0, len(data), size)]
        assert len(read(*parts).token_s) == 2


def test_carriage_returns() -> None:
    assert len(read(text_event("a", finish_reason="stop").replace(b"\n", b"\r\n"), DONE).token_s) == 1


def test_a_last_event_without_text_brings_no_token_but_for_the_only_one() -> None:
    assert read(text_event("a"), text_event("", finish_reason="stop"), DONE).token_s == [0.0]
    assert read(text_event("", finish_reason="stop"), DONE).token_s == [0.0]


def chat(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})


def test_a_chat_whose_first_event_names_the_role() -> None:
    answer = read(
        chat({"role": "assistant", "content": ""}),
        chat({"content": "a"}),
        chat({"reasoning_content": "b"}),
        chat({}, "stop"),
        DONE,
    )
    assert answer.token_s == [1.0, 2.0]


def test_a_stream_that_says_why_it_ends_needs_no_done() -> None:
    assert read(text_event("a", finish_reason="stop")).token_s == [0.0]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "no token came"),
        ((DONE,), "no token came"),
        ((usage_event(1, 1), DONE), "no token came"),
        ((text_event("a"),), "the stream ended early"),
        ((b"data: {broken\n\n",), "an event that is not JSON: {broken"),
        ((b"data: \xff\xfe\n\n",), "an event that is not JSON"),
        ((b"data: [1]\n\n",), "an event that is no object"),
        ((event({"choices": "no"}),), "malformed choices"),
        ((event({"choices": [1]}),), "malformed choices"),
        ((text_event("a"), event({"error": {"message": "out of memory"}})), "the server ended the stream: out of mem"),
    ],
)
def test_what_is_no_answer(parts: tuple[bytes, ...], message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        read(*parts)


def test_choices_or_usage_that_are_null() -> None:
    answer = read(event({"choices": None, "usage": None}), text_event("a", finish_reason="stop"))
    assert answer.token_s == [1.0]


def test_messages_of_errors() -> None:
    assert error_message({"error": {"message": "no"}}) == "no"
    assert error_message({"error": "no"}) == "no"
    assert error_message({"detail": "no"}) == "{'detail': 'no'}"
    assert error_message("x" * 999) == "x" * 200
