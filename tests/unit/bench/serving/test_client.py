"""Against servers that answer rightly, wrongly, slowly, or not at all."""

from __future__ import annotations

import asyncio
import math
import socket
from typing import Any

import pytest

from piecework.bench.serving.client import Endpoint, base_url
from piecework.bench.serving.figures import Outcome
from piecework.bench.serving.run import ServeSettings, measure_server
from piecework.bench.serving.workload import Lengths
from piecework.errors import PieceworkError
from tests.unit.bench.serving.stub_server import (
    DONE,
    STREAM,
    good_answer,
    http,
    stub_server,
    text_event,
)

SMALL: dict[str, Any] = {"requests": 6, "lengths": Lengths.FIXED, "input": 5, "output": 3}


def measure(url: str, **changes: Any) -> tuple[Outcome, ...]:
    settings = ServeSettings(url, **{**SMALL, **changes})
    return measure_server(settings, on_progress=lambda text, done, total: None).outcomes


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "h:1"])
def test_urls(url: str) -> None:
    assert base_url(url) == "http://h:1/v1"


def test_a_good_server() -> None:
    with stub_server(good_answer) as stub:
        outcomes = measure(stub.url, api_key="secret", seed=3)
    assert [o.error for o in outcomes] == [""] * 6
    assert all((o.input_tokens, o.output_tokens, len(o.token_s)) == (5, 3, 3) for o in outcomes)
    assert all(0 < o.ttft_s <= o.token_s[-1] <= o.latency_s for o in outcomes)
    assert len(stub.seen) == 7  # the first one warms up
    bodies = [body for _, _, body in stub.seen[1:]]
    assert {path for path, _, _ in stub.seen} == {"/v1/completions"}
    assert {headers["authorization"] for _, headers, _ in stub.seen} == {"Bearer secret"}
    assert all(
        (b["model"], b["max_tokens"], b["temperature"], b["stream"], b["ignore_eos"], b["stream_options"])
        == ("stub-model", 3, 0.0, True, True, {"include_usage": True})
        for b in bodies
    )
    assert len({str(b["prompt"]) for b in bodies}) == 6
    assert all(len(b["prompt"]) == 5 for b in bodies)


def test_prompts_as_text_are_as_long_as_the_server_counts() -> None:
    with stub_server(good_answer) as stub:  # counts two tokens a word
        outcomes = measure(stub.url, text=True, input=40, ignore_eos=False)
    assert [o.input_tokens for o in outcomes] == [40] * 6
    assert all(isinstance(body["prompt"], str) and "ignore_eos" not in body for _, _, body in stub.seen)


def test_chats() -> None:
    with stub_server(_chat) as stub:
        outcomes = measure(stub.url, endpoint=Endpoint.CHAT, model="other")
    assert [o.error for o in outcomes] == [""] * 6
    path, _, body = stub.seen[-1]
    assert (path, body["model"], body["messages"][0]["role"]) == ("/v1/chat/completions", "other", "user")


async def _chat(number: int, body: dict[str, Any]):
    yield STREAM
    yield b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}\n\n'
    yield DONE


def test_errors_of_single_requests_are_kept() -> None:
    async def answer(number: int, body: dict[str, Any]):
        match number - 1:
            case 0:
                yield http(b'{"error": {"message": "come back later"}}', status="429 Too Many Requests")
            case 1:
                yield STREAM + text_event("a")  # and the connection ends
            case 2:
                yield STREAM + b"data: {broken\n\n"
            case 3:
                yield http(b"<html>", status="502 Bad Gateway", kind="text/html")
            case 4:
                yield http(b'{"choices": [{"text": "whole"}]}')
            case _:
                async for data in good_answer(number, body):
                    yield data

    with stub_server(answer) as stub:
        outcomes = measure(stub.url, concurrency=1)
    assert sorted(o.error for o in outcomes) == [
        "",
        "HTTP 429: come back later",
        "HTTP 502: <html>",
        "an event that is not JSON: {broken",
        "no stream of events but application/json",
        "the stream ended early",
    ]


def test_a_connection_that_breaks_is_an_error_of_its_request() -> None:
    async def answer(number: int, body: dict[str, Any]):
        if number == 1:
            yield b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 999\r\n\r\ndata: "
            return
        async for data in good_answer(number, body):
            yield data

    with stub_server(answer) as stub:
        errors = [o.error for o in measure(stub.url)]
    assert sum(bool(error) for error in errors) == 1
    assert any("RemoteProtocolError" in error for error in errors)


def test_a_server_that_hangs() -> None:
    async def answer(number: int, body: dict[str, Any]):
        if number == 1:
            yield STREAM + text_event("a")
            await asyncio.sleep(0.6)
            return
        async for data in good_answer(number, body):
            yield data

    with stub_server(answer) as stub:
        errors = [o.error for o in measure(stub.url, timeout_s=0.3)]
    assert sorted(set(errors)) == ["", "no end after 0.3 s"]


def test_never_more_at_a_time_than_allowed() -> None:
    async def answer(number: int, body: dict[str, Any]):
        await asyncio.sleep(0.02)
        async for data in good_answer(number, body):
            yield data

    for concurrency, most in ((2, 2), (None, 12)):
        with stub_server(answer) as stub:
            measure(stub.url, concurrency=concurrency, requests=12)
            assert stub.most <= most
            assert stub.most > 1


def test_requests_are_sent_when_they_are_due() -> None:
    with stub_server(good_answer) as stub:
        outcomes = measure(stub.url, rate=100.0, requests=20)
    begins = [o.begin_s for o in outcomes]
    assert begins == sorted(begins)
    assert begins[-1] > 0.05  # 19 gaps of 10 ms on average; all at once would be much sooner


def test_no_warm_up() -> None:
    with stub_server(good_answer) as stub:
        measure(stub.url, warm_up=False, model="m")
        assert len(stub.seen) == 6


@pytest.mark.parametrize("model", [None, "named"])
def test_nobody_listens(model: str | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(PieceworkError, match="ConnectError"):
        measure(f"http://127.0.0.1:{port}", model=model)


def test_nobody_listens_any_more_once_it_runs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    outcomes = measure(f"http://127.0.0.1:{port}", model="m", warm_up=False)
    assert len(outcomes) == 6
    assert all(o.error.startswith("ConnectError") for o in outcomes)


@pytest.mark.parametrize(
    ("models", "found"),
    [
        (http(b'{"data": []}'), "an answer that lists none"),
        (http(b"[]"), "an answer that lists none"),
        (http(b"no json"), "an answer that lists none"),
        (http(b'{"error": {"message": "no key"}}', status="401 Unauthorized"), "HTTP 401: no key"),
    ],
)
def test_a_server_that_names_no_model(models: bytes, found: str) -> None:
    with stub_server(good_answer, models=models) as stub, pytest.raises(PieceworkError, match=found):
        measure(stub.url)


def test_a_first_request_that_fails_ends_it() -> None:
    async def answer(number: int, body: dict[str, Any]):
        yield http(b'{"error": {"message": "token 999 is none"}}', status="400 Bad Request")

    with stub_server(answer) as stub, pytest.raises(PieceworkError, match="HTTP 400: token 999 is none"):
        measure(stub.url)
    assert len(stub.seen) == 1


def test_a_url_that_is_none() -> None:
    with pytest.raises(PieceworkError):
        measure("http://[nonsense")


def test_progress() -> None:
    told: list[tuple[str, int, int]] = []
    with stub_server(good_answer) as stub:
        settings = ServeSettings(stub.url, **{**SMALL, "requests": 50})
        measure_server(settings, on_progress=lambda text, done, total: told.append((text, done, total)))
    assert told[0] == ("warming up", 0, 0)
    assert told[-1] == ("requests", 50, 50)
    assert len(told) == 12
    assert math.isinf(settings.rate)
