"""What a client can do wrong at the level of HTTP, and what every answer has in common."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families as families

import piecework
from piecework.server.figures.names import OF_VLLM
from piecework.server.settings import Limits, ServerSettings
from piecework.server.status import ServerStatus
from tests.unit.server.fake import REPORT, FakeService, ready
from tests.unit.server.live import eventually, live_server

GOOD = {"model": "fake", "prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=10) as http:
        yield http


def error_of(response: httpx.Response) -> dict:
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not valid JSON"),
        (b"", "the body"),
        (b"\xff\xfe", ""),
        (b"null", "the body"),
        (b"[]", "the body"),
        (b'"text"', "the body"),
        (b"[" * 100_000, ""),
        (b'{"model": "fake", "prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"model": "fake", "prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"model": "fake", "prompt": "x", "seed": ' + b"9" * 100 + b"}", "seed"),
        (b'{"model": "fake", "prompt": "x", "seed": ' + b"9" * 10_000 + b"}", ""),
        (b'{"model": "fake", "prompt": "\xed\xa0\x80"}', "not UTF-8"),
        (
            b'{"model": "fake", "prompt": "x", "structured_outputs": {"json": ' + b'{"a":' * 400 + b"1" + b"}" * 402,
            "deeper",
        ),
        (b'{"model": "fake", "prompt": "\\ud800"}', "no Unicode"),
        (b'{"model": "\\uD800", "prompt": "x"}', "no Unicode"),
        (b'{"model": "fake"}', "prompt"),
        (b'{"prompt": "x"}', "model"),
    ],
)
def test_a_malformed_body_is_a_400(http, body, message):
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert message in error_of(response)["message"]


def test_brackets_in_text_are_not_nesting(http):
    call = {"type": "function", "function": {"name": "f", "arguments": "[" * 5000}}
    messages = [{"role": "user", "content": '\\"{' * 300}, {"role": "assistant", "tool_calls": [call]}]
    answer = http.post("/v1/chat/completions", json={"model": "fake", "max_tokens": 1, "messages": messages})
    assert answer.status_code == 200


def test_of_a_prompt_that_is_much_too_long_only_a_beginning_is_encoded(http, service, monkeypatch):
    lengths = []
    encode = service.encode
    monkeypatch.setattr(service, "encode", lambda text: lengths.append(len(text)) or encode(text))
    for path, body in (
        ("completions", {"prompt": "x" * 5_000_000}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 5_000_000}]}),
    ):
        answer = http.post(f"/v1/{path}", json={"model": "fake", **body})
        assert answer.status_code == 400
        assert error_of(answer)["code"] == "context_length_exceeded"
    assert 0 < max(lengths) < 50_000


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(
            (host, 200)
            for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "::1", "10.1.2.3", "a.localhost", "mine")
        ),
        *((host, 421) for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "1.2.3.4.example")),
    ],
)
def test_other_names_than_the_servers_are_refused(host, status):
    settings = ServerSettings(model_names=("fake",), hosts=("Mine",))
    with live_server(ready(FakeService()), settings) as url:
        answer = httpx.get(f"{url}/v1/models", headers={"host": host})
        assert answer.status_code == status
        assert httpx.get(f"{url}/v1/models").status_code == 200


def test_any_name_by_choice():
    with live_server(ready(FakeService()), ServerSettings(model_names=("fake",), hosts=("*",))) as url:
        assert httpx.get(f"{url}/v1/models", headers={"host": "any.example"}).status_code == 200


def test_half_a_surrogate_pair_anywhere_is_refused_and_a_whole_one_is_not(http):
    headers = {"content-type": "application/json"}
    good = b'{"model": "fake", "prompt": "\\ud83d\\ude00", "max_tokens": 1}'
    assert http.post("/v1/completions", content=good, headers=headers).status_code == 200
    for part in (
        '"messages": [{"role": "user", "content": "\\ud800"}]',
        '"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": "\\ud800"}',
        '"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "f", '
        '"parameters": {"\\ud800": 1}}}]',
    ):
        body = f'{{"model": "fake", "max_tokens": 1, {part}}}'
        assert http.post("/v1/chat/completions", content=body, headers=headers).status_code == 400


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_another_content_type_is_a_415(http, kind):
    response = http.post("/v1/completions", content=json.dumps(GOOD), headers={"content-type": kind})
    assert response.status_code == 415
    error_of(response)


def test_no_content_type_is_a_415(url):
    body = json.dumps(GOOD).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: ::1\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    assert b" 415 " in _raw(url, head.encode() + body).split(b"\r\n")[0]


def test_json_with_a_charset_is_json(http):
    headers = {"content-type": "application/json; charset=utf-8"}
    assert http.post("/v1/completions", content=json.dumps(GOOD), headers=headers).status_code == 200


def test_unknown_paths_and_methods(http):
    assert error_of(http.get("/v1/nothing"))["code"] == "not_found"
    response = http.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    error_of(response)


def test_a_large_body_is_refused_by_its_length_alone_or_when_it_has_come():
    settings = ServerSettings(model_names=("fake",), limits=Limits(body_bytes=10_000))
    with live_server(ready(FakeService()), settings) as url, httpx.Client(base_url=url) as http:
        body = json.dumps({**GOOD, "prompt": "x" * 20_000}).encode()
        headers = {"content-type": "application/json"}
        for content in (body, iter([body[:9_000], body[9_000:]])):
            response = http.post("/v1/completions", content=content, headers=headers)
            assert response.status_code == 413
            assert error_of(response)["code"] == "request_too_large"
        # nothing of it was read: the answer comes before the body was sent
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: ::1\r\nContent-Type: application/json\r\nContent-Length: 99999999"
        )
        assert b" 413 " in _raw(url, f"{head}\r\n\r\n".encode()).split(b"\r\n")[0]
        assert http.post("/v1/completions", json=GOOD).status_code == 200


@pytest.fixture(scope="module")
def guarded():
    settings = ServerSettings(model_names=("fake",), api_key="sésame")
    with live_server(ready(FakeService()), settings) as url, httpx.Client(base_url=url) as http:
        yield http


class TestKey:
    @pytest.mark.parametrize(
        "given", [None, "Bearer", "Bearer x", "sésame", "Bearersésame", "Basic sésame", "Bearer sésame2"]
    )
    def test_without_the_key_nothing_of_v1_answers(self, guarded, given):
        headers = {} if given is None else {"authorization": given.encode()}
        for response in (
            guarded.get("/v1/models", headers=headers),
            guarded.post("/v1/completions", json=GOOD, headers=headers),
            guarded.post("/v1/chat/completions", content=b"{", headers=headers),
            guarded.get("/v1/piecework/status", headers=headers),
            guarded.get("/v1/nothing", headers=headers),
            guarded.post("/tokenize", json={"prompt": "x"}, headers=headers),
        ):
            assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"

    def test_with_the_key(self, guarded):
        for given in ("Bearer sésame", "bearer sésame"):
            headers = {"authorization": given.encode()}
            assert guarded.post("/v1/completions", json=GOOD, headers=headers).status_code == 200

    def test_health_metrics_and_the_page_need_none(self, guarded):
        assert [guarded.get(path).status_code for path in ("/health", "/metrics", "/")] == [200, 200, 200]

    def test_the_settings_do_not_show_it(self):
        assert "sesame" not in repr(ServerSettings(model_names=("fake",), api_key="sesame"))


def test_one_request_too_many_is_a_429_and_goes_in_later():
    service = FakeService(step_s=0.05)
    settings = ServerSettings(model_names=("fake",), limits=Limits(concurrent_requests=1, retry_after_s=3))
    with live_server(ready(service), settings) as url, httpx.Client(base_url=url) as http:
        with http.stream("POST", "/v1/completions", json={**GOOD, "max_tokens": 500, "stream": True}):
            refused = http.post("/v1/completions", json=GOOD)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "3"
            assert error_of(refused)["type"] == "rate_limit_error"
        assert eventually(lambda: http.post("/v1/completions", json=GOOD).status_code == 200)


class TestInformation:
    def test_health(self, http):
        assert http.get("/health").json() == {"status": "ready", "serving": "aoti", "message": ""}

    def test_version_and_ping(self, http):
        assert http.get("/version").json() == {"version": piecework.__version__}
        assert http.get("/ping").json()["status"] == "ready"

    def test_tokens_and_back(self, http):
        answer = http.post("/tokenize", json={"model": "fake", "prompt": "Hi", "return_token_strs": True})
        assert answer.json() == {"count": 2, "max_model_len": 2048, "tokens": [72, 105], "token_strs": ["H", "i"]}
        assert http.post("/detokenize", json={"tokens": [72, 105]}).json() == {"prompt": "Hi"}
        talk = {"messages": [{"role": "user", "content": "x"}]}
        assert http.post("/tokenize", json=talk).json()["count"] == len("user: x\nassistant:")
        for wrong in ({}, {"prompt": "x", **talk}, {"prompt": "x", "add_generation_prompt": False}):
            assert http.post("/tokenize", json=wrong).status_code == 400
        assert http.post("/tokenize", json={"model": "other", "prompt": "x"}).status_code == 404

    def test_the_bundle(self, http):
        assert http.get("/v1/piecework/bundle").json() == REPORT

    def test_the_status(self, http):
        http.post("/v1/completions", json=GOOD)
        status = http.get("/v1/piecework/status").json()
        assert [phase["name"] for phase in status["phases"]] == ["weights", "tokenizer"]
        assert (status["state"], status["serving"], status["bundle_hit"]) == ("ready", "aoti", True)
        assert status["first_token_s"] > 0
        assert status["engine"]["kv_blocks_total"] == 100

    def test_metrics(self, http, service: FakeService):
        http.post("/v1/completions", json={**GOOD, "max_tokens": 3})
        http.get("/v1/made-up-by-somebody")
        response = http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=")
        figures = {sample.name: sample.value for f in families(response.text) for sample in f.samples}
        assert figures["piecework_time_to_first_token_seconds_count"] > 0
        assert figures["piecework_inter_token_seconds_count"] >= 2
        assert figures["piecework_decode_seconds_count"] > 0
        assert figures["piecework_generated_tokens_total"] == service.generated
        assert figures["piecework_kv_blocks"] == 100
        for line in (
            'piecework_bundle_lookups_total{model_name="fake",result="hit"} 1.0',
            'piecework_startup_phase_seconds{model_name="fake",phase="weights"}',
            'piecework_state{model_name="fake",state="ready"} 1.0',
            'piecework_http_requests_total{model_name="fake",path="/v1/completions",status="200"}',
        ):
            assert line in response.text
        assert "made-up" not in response.text

    def test_metrics_keep_to_the_conventions(self, http):
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        response = http.get("/metrics", headers=accept)
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        assert response.text.endswith("# EOF\n")
        for family in [*open_families(response.text), *families(http.get("/metrics").text)]:
            assert all("model_name" in sample.labels for sample in family.samples)
            assert family.type == "counter" or not any(s.name.endswith("_total") for s in family.samples)

    def test_metrics_under_the_names_of_vllm(self):
        settings = ServerSettings(model_names=("fake",), metrics="vllm")
        with live_server(ready(FakeService()), settings) as url:
            httpx.post(f"{url}/v1/completions", json=GOOD)
            text = httpx.get(f"{url}/metrics").text
        for name in set(OF_VLLM.values()):
            assert f"\n# HELP {name}" in text
        assert 'vllm:request_success_total{finished_reason="length",model_name="fake"} 1.0' in text

    def test_two_servers_count_for_themselves(self, http):
        with live_server(ready(FakeService()), ServerSettings(model_names=("fake",))) as url:
            assert 'path="/v1/completions"' not in httpx.get(f"{url}/metrics").text


class TestNotReady:
    def test_before_the_model_is_there(self):
        status = ServerStatus()
        with live_server(status, ServerSettings(model_names=("fake",))) as url, httpx.Client(base_url=url) as http:
            assert (http.get("/health").status_code, http.get("/health").json()["status"]) == (503, "starting")
            status.compile_begins(reason="torch version: bundle 1, here 2", backend="aoti")
            status.compile_goes_on("lowering", done=1, total=3)
            assert (http.get("/health").status_code, http.get("/health").json()["status"]) == (503, "compiling")
            refused = http.post("/v1/completions", json=GOOD)
            assert (refused.status_code, error_of(refused)["code"]) == (503, "compiling")
            assert refused.headers["retry-after"] == "1"
            compiling = http.get("/v1/piecework/status").json()["compile"]
            assert (compiling["reason"], compiling["done"]) == ("torch version: bundle 1, here 2", 1)
            assert http.get("/v1/piecework/bundle").status_code == 503
            assert http.get("/v1/models").json()["data"][0]["max_model_len"] is None
            assert http.get("/metrics").status_code == 200

    def test_while_another_backend_serves(self):
        service = FakeService()
        status = ready(service)
        status.compile_begins(reason="none", backend="aoti")
        with live_server(status, ServerSettings(model_names=("fake",))) as url, httpx.Client(base_url=url) as http:
            assert http.get("/health").json()["status"] == "compiling"
            assert http.get("/health").status_code == 200
            assert http.post("/v1/completions", json=GOOD).status_code == 200
            status.compile_ends()
            assert http.get("/health").json()["status"] == "ready"

    def test_after_a_failure(self):
        status = ServerStatus()
        status.fails("no weights")
        with live_server(status, ServerSettings(model_names=("fake",))) as url, httpx.Client(base_url=url) as http:
            refused = http.post("/v1/completions", json=GOOD)
            assert refused.status_code == 503
            assert "no weights" in error_of(refused)["message"]
            assert http.get("/health").json() == {"status": "failed", "message": "no weights"}


def _raw(url: str, data: bytes) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def test_an_engine_that_has_ended_fails_requests_and_health():
    service = FakeService()
    with live_server(ready(service), ServerSettings(model_names=("fake",))) as url, httpx.Client(base_url=url) as http:
        service.failed = "the engine failed: ValueError: broken"
        refused = http.post("/v1/completions", json=GOOD)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "failed")
        assert "broken" in error_of(refused)["message"]
        assert (http.get("/health").status_code, http.get("/health").json()["status"]) == (503, "failed")
        assert 'piecework_state{model_name="fake",state="failed"} 1.0' in http.get("/metrics").text
