"""Clients that go away, servers that are ended: nothing is leaked, and no answer is lost that could be given."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from piecework.server.settings import Limits, ServerSettings
from tests.unit.server.fake import FakeService, ready
from tests.unit.server.live import eventually, live_server

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: ::1\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
LONG = {"model": "fake", "prompt": "x", "max_tokens": 2000}


@pytest.fixture
def slow():
    service = FakeService(step_s=0.01)
    settings = ServerSettings(model_names=("fake",), limits=Limits(concurrent_requests=50))
    with live_server(ready(service), settings) as url, httpx.Client(base_url=url, timeout=10) as http:
        yield service, url, http


def _send(url: str, body: dict, *, path: str = "/v1/completions") -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=5)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: ::1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_a_client_that_leaves_a_stream_frees_its_memory_within_a_step(slow):
    service, url, http = slow
    connection = _send(url, {**LONG, "stream": True})
    assert eventually(lambda: len(service.active) == 1)
    assert connection.recv(4096)
    connection.close()
    before = time.monotonic()
    assert eventually(lambda: not service.active, seconds=1)
    assert time.monotonic() - before < 0.5
    assert eventually(lambda: 'piecework_client_disconnects_total{model_name="fake"} 1.0' in http.get("/metrics").text)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_before_a_whole_answer_is_no_different(slow, path):
    service, url, _ = slow
    body = {**LONG, "messages": [{"role": "user", "content": "x"}]}
    connection = _send(url, body, path=path)
    assert eventually(lambda: len(service.active) == 1)
    connection.close()
    assert eventually(lambda: not service.active, seconds=1)


def test_all_of_a_requests_prompts_end_with_it(slow):
    service, url, _ = slow
    connection = _send(url, {**LONG, "prompt": ["a", "b", "c"], "n": 2, "stream": True})
    assert eventually(lambda: len(service.active) == 3)
    connection.close()
    assert eventually(lambda: not service.active, seconds=1)


def test_a_failing_prompt_ends_the_others(slow):
    service, _, http = slow
    service.fail_after = 3
    response = http.post("/v1/completions", json={**LONG, "prompt": ["a", "b", "c"]})
    assert response.status_code == 500
    assert service.active == set()
    assert len(service.ended) == 3


def test_a_hundred_clients_that_leave_leave_nothing(slow):
    service, url, http = slow
    for _ in range(2):
        connections = [_send(url, {**LONG, "stream": index % 2 == 0}) for index in range(50)]
        assert eventually(lambda: len(service.active) == 50)
        assert http.post("/v1/completions", json=LONG).status_code == 429
        for connection in connections:
            connection.close()
        assert eventually(lambda: not service.active)
    assert http.post("/v1/completions", json={**LONG, "max_tokens": 1}).status_code == 200


def test_a_body_that_stops_half_way_holds_nothing(slow):
    service, url, http = slow
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(HEAD + b"{")
    assert http.post("/v1/completions", json={**LONG, "max_tokens": 1}).status_code == 200
    assert len(service.seen) == 1


def test_a_client_that_reads_slowly_gets_everything(slow):
    service, url, _ = slow
    service.step_s = 0
    connection = _send(url, {**LONG, "n": 4, "logprobs": 5, "stream": True})
    time.sleep(0.3)
    answer = b""
    while not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        part = connection.recv(1 << 16)
        assert part
        answer += part
    assert answer.count(b'"finish_reason":"length"') == 4
    connection.close()


SERVER = """
import sys
from pathlib import Path
from piecework.server.app import make_app
from piecework.server.log import EventLog
from piecework.server.listening import listen, url_of
from piecework.server.run import HttpServer
from piecework.server.settings import Limits, ServerSettings
from tests.unit.server.fake import FakeService, ready

service = FakeService(step_s=0.02)
status = ready(service)
log = EventLog(sys.stderr)
limits = Limits(drain_s=float(sys.argv[1]), receive_s=float(sys.argv[2]), connections=int(sys.argv[3]))
app = make_app(status, ServerSettings(model_names=("fake",), limits=limits), log=log)
listening = listen("127.0.0.1", port=0)
print(url_of(listening), flush=True)
HttpServer(app, listening=listening, limits=limits, log=log, on_drain=status.drains).run()
print("active", len(service.active), "ended", len(service.ended), flush=True)
"""


@pytest.fixture
def process(request):
    root = Path(__file__).resolve().parents[3]
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, *map(str, request.param)],
        cwd=root,
        env={"PYTHONPATH": f"{root / 'src'}:{root}", "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield server, server.stdout.readline().strip()
    server.kill()
    server.communicate()


@pytest.mark.parametrize("process", [(10, 20, 100)], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_finish_and_takes_nothing_new(process, number):
    server, url = process
    answers: list[int] = []

    def ask(length: int) -> None:
        answer = httpx.post(f"{url}/v1/completions", json={**LONG, "max_tokens": length}, timeout=20).json()
        answers.append(answer["usage"]["completion_tokens"])

    clients = [threading.Thread(target=ask, args=(30 + index,)) for index in range(8)]
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "max_tokens": 40, "stream": True}) as stream:
        for client in clients:
            client.start()
        assert eventually(lambda: httpx.get(f"{url}/v1/piecework/status").json()["engine"]["running"] == 9)
        server.send_signal(number)
        assert eventually(lambda: _refuses(url))
        text = stream.read().decode()
    for client in clients:
        client.join()
    assert sorted(answers) == [30 + index for index in range(8)]
    assert text.endswith("data: [DONE]\n\n")
    out, err = server.communicate(timeout=10)
    assert (server.returncode, out, err) == (0, "active 0 ended 9\n", "")


@pytest.mark.parametrize("process", [(1, 20, 100)], indirect=True)
def test_what_takes_longer_than_the_limit_is_cut_off(process):
    server, url = process
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    out, err = server.communicate(timeout=10)
    assert (server.returncode, out) == (0, "active 0 ended 1\n")
    assert "timeout graceful shutdown exceeded" in err
    assert "Traceback" not in err


PARTS = [b"", b"POST /v1/comp", HEAD, HEAD + b"{"]
"""What clients send before they fall silent: nothing, half a head, a head, half a body."""


def _connect(url: str, sent: bytes) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(sent)
    return connection


def _answer(connection: socket.socket) -> bytes:
    """Return what comes until the server closes the connection."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("process", [(30, 0.6, 100)], indirect=True)
def test_connections_without_a_whole_request_are_closed_and_others_are_not(process):
    _, url = process
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "max_tokens": 100, "stream": True}) as stream:
        begun = time.monotonic()
        for sent in PARTS[:3]:
            with _connect(url, sent) as connection:
                answer = _answer(connection)
            assert answer.startswith(b"HTTP/1.1 408") if sent.startswith(HEAD) else answer == b""
        assert time.monotonic() - begun < 8
        assert stream.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("process", [(30, 20, 4)], indirect=True)
def test_of_too_many_connections_the_longest_idle_are_closed(process):
    _, url = process
    connections = [_connect(url, b"")]
    time.sleep(0.3)
    connections += [_connect(url, b"") for _ in range(4)]
    first, *others = connections
    assert _answer(first) == b""
    time.sleep(0.3)
    others[-1].sendall(b"GET /health HTTP/1.1\r\nHost: ::1\r\nConnection: close\r\n\r\n")
    assert _answer(others[-1]).startswith(b"HTTP/1.1 200")
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("process", [(30, 20, 100)], indirect=True)
def test_the_end_waits_for_no_request_that_isnt_there_yet(process):
    server, url = process
    connections = [_connect(url, sent) for sent in PARTS]
    assert httpx.get(f"{url}/health").status_code == 200
    begun = time.monotonic()
    server.send_signal(signal.SIGTERM)
    out, _ = server.communicate(timeout=20)
    assert (server.returncode, out) == (0, "active 0 ended 0\n")
    assert time.monotonic() - begun < 5
    assert [_answer(connection)[:12] for connection in connections] == [b"", b"", b"HTTP/1.1 503", b"HTTP/1.1 503"]
    for connection in connections:
        connection.close()


def _refuses(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.TransportError:
        return True
    return False
