"""`piecework serve` in processes of its own: cold with the eager backend meanwhile, then warm without a compiler."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

import piecework

MODEL = Path(piecework.__file__).parent / "demo_model"
PROMPT = "The for statement is used to"
EXPECTED = "iterate over the elements of a sequence"
_SERVE = """
import json, sys
from piecework.cli.main import main
code = main(sys.argv[1:])
names = ("sympy", "triton", "transformers")
banned = [m for m in sys.modules if m.split(".")[0] in names or m.startswith(("torch._dynamo", "torch._inductor"))]
print(json.dumps({"code": code, "banned": banned}), flush=True)
"""


class Server:
    """A server's process, with what it logged so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.events: list[dict] = []
        self.other: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def url(self) -> str:
        return self.wait("listening")["url"]

    def wait(self, name: str, *, seconds: float = 240, **fields: str) -> dict:
        """Return the first event of a name, with these fields, when it has come."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for event in list(self.events):
                if event["event"] == name and all(event.get(key) == value for key, value in fields.items()):
                    return event
            assert self.process.poll() is None, (self.events, self.other)
            time.sleep(0.02)
        raise AssertionError(f"no event {name}: {self.events}, {self.other}")

    def end(self) -> dict:
        """Send SIGTERM and return what the process printed at its end."""
        self.process.send_signal(signal.SIGTERM)
        output = self.process.stdout.read()
        assert self.process.wait(30) == 0
        self._reader.join()
        assert self.other == []
        return json.loads(output)

    def _read(self) -> None:
        for line in self.process.stderr:
            try:
                self.events.append(json.loads(line))
            except ValueError:
                self.other.append(line)


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory, new_home: Callable[[Path], Path]) -> Callable[..., object]:
    """Return what starts a server, on a store that all of this file's servers share."""
    home = new_home(tmp_path_factory.mktemp("serve-home"))

    @contextmanager
    def serve(*options: str, **environment: str) -> Iterator[Server]:
        command = [sys.executable, "-c", _SERVE, "serve", str(MODEL), "--port", "0", "--json", "--kv-memory", "32MiB"]
        process = subprocess.Popen(
            [*command, *options],
            env={**os.environ, "PIECEWORK_HOME": str(home), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield Server(process)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()

    return serve


def _client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def _continued(client: openai.OpenAI) -> str:
    return client.completions.create(model="demo_model", prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text


def test_cold_then_warm(serve):
    with serve("--while-compiling", "eager") as server:
        assert (
            httpx.post(f"{server.url}/v1/completions", json={"model": "demo_model", "prompt": "x"}).status_code == 503
        )
        assert server.wait("bundle_missing")["reason"] == "no bundle of this model in the store"
        assert server.wait("ready")["backend"] == "eager"
        with _client(server.url) as client:
            assert _continued(client).strip() == EXPECTED
            health = httpx.get(f"{server.url}/health").json()
            assert (health["status"], health["serving"]) == ("compiling", "eager")
            # a text that is under way when the models are exchanged goes on
            server.wait("compiling", backend="aoti", stage="sealing")
            asked = {"model": "demo_model", "prompt": PROMPT, "max_tokens": 480, "temperature": 0, "stream": True}
            chunks = list(client.completions.create(**asked, extra_body={"ignore_eos": True}))
            assert chunks[-1].choices[0].finish_reason == "length"
            assert "".join(chunk.choices[0].text for chunk in chunks).strip().startswith(EXPECTED)
            server.wait("switched")
            assert _continued(client).strip() == EXPECTED
            assert httpx.get(f"{server.url}/health").json() == {"status": "ready", "serving": "aoti", "message": ""}
        stages = [(event["backend"], event["stage"]) for event in server.events if event["event"] == "compiling"]
        assert stages.index(("eager", "capturing")) < stages.index(("aoti", "capturing"))
        server.end()

    # no compiler and no modelling code can be reached any more
    with serve(PATH="") as server:
        assert server.wait("ready")["bundle"] == "hit"
        with _client(server.url) as client:
            assert _continued(client).strip() == EXPECTED
            chat = client.chat.completions.create(
                model="demo_model", messages=[{"role": "user", "content": "hi"}], max_tokens=4, logprobs=True, n=2
            )
            assert len(chat.choices) == 2
            bundle = httpx.get(f"{server.url}/v1/piecework/bundle").json()
            assert bundle["num_unique_pieces"] == 3
        assert server.end() == {"code": 0, "banned": []}


@pytest.mark.slow
def test_a_compile_ends_with_its_server(serve):
    with serve("--dtype", "float32") as server:
        server.wait("compiling")
        assert httpx.get(f"{server.url}/health").json()["status"] == "compiling"
        children = _children(server.process.pid)
        assert children
        assert server.end()["code"] == 0
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--bundle", "/nowhere"], "nowhere"),
        (["--kv-memory", "1kB"], "KV cache"),
    ],
)
def test_what_can_not_be_served_ends_the_server(serve, options, found):
    with serve(*options) as server:
        output = server.process.stdout.read()
        assert server.process.wait(60) == 0  # of the script; the command's own code is in its output
        error, end = map(json.loads, output.splitlines())
        assert found in error["asked"] + error["found"]
        assert end["code"] == 1


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] or [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
