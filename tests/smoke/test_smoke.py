"""The demo model from a cold compile to tokens, by each way in: what must work with every version of torch.

`tests/torch_versions.sh` runs this file with several of them; `PIECEWORK_SMOKE` names a file for its figures.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import piecework

pytestmark = pytest.mark.slow  # other tests do the same with this torch

MODEL = Path(piecework.__file__).parent / "demo_model"
PROMPT = "The for statement is used to"
EXPECTED = "iterate over the elements of a sequence"
_COMMAND = """
import json, sys
from piecework.cli.main import main
code = main(sys.argv[1:])
names = ("sympy", "triton", "transformers")
banned = [m for m in sys.modules if m.split(".")[0] in names or m.startswith(("torch._dynamo", "torch._inductor"))]
sys.stderr.write("\\n" + json.dumps({"code": code, "banned": banned}))
"""

Note = Callable[[str, float], None]


@pytest.fixture(scope="module")
def note() -> Note:
    """Return what writes a figure's line, where the environment names a file for them."""
    target = os.environ.get("PIECEWORK_SMOKE")

    def write(what: str, value: float) -> None:
        if target:
            with Path(target).open("a") as file:
                file.write(json.dumps({"torch": torch.__version__, "what": what, "value": round(value, 2)}) + "\n")

    return write


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, new_home: Callable[[Path], Path]) -> dict[str, str]:
    """A store that was empty before the demo model was compiled."""
    home = tmp_path_factory.mktemp("smoke")
    return {**os.environ, "PIECEWORK_HOME": str(home if "PIECEWORK_SMOKE" in os.environ else new_home(home))}


@pytest.fixture(scope="module")
def compiled(environment: dict[str, str], note: Note) -> dict[str, Any]:
    """The figures of a cold compile, and of asking for it again."""
    made = _compile(environment)
    note("compile, cold", made["cold_s"])
    again = _compile(environment)
    assert (again["cached"], again["bundle"]) == (True, made["bundle"])
    note("compile, again", again["cold_s"])
    return made


def _compile(environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "piecework", "compile", str(MODEL), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_six_layers_are_three_pieces(compiled: dict[str, Any]) -> None:
    assert (compiled["layers"], compiled["pieces"], compiled["unique_pieces"]) == (6, 7, 3)


def test_text_comes_warm_without_a_compiler(compiled: dict[str, Any], environment: dict[str, str], note: Note) -> None:
    options = ["generate", str(MODEL), "--prompt", PROMPT, "--max-new-tokens", "12", "--json"]
    warm = subprocess.run(
        [sys.executable, "-c", _COMMAND, *options],
        env={**environment, "PATH": ""},  # no compiler can be reached
        capture_output=True,
        text=True,
        check=False,
    )
    assert warm.returncode == 0, warm.stderr
    assert json.loads(warm.stderr.splitlines()[-1]) == {"code": 0, "banned": []}
    found = json.loads(warm.stdout)
    assert EXPECTED in found["text"]
    note("generate, warm: first token", found["first_token_s"])


def test_one_request_is_served(compiled: dict[str, Any], environment: dict[str, str]) -> None:
    httpx = pytest.importorskip("httpx")
    options = ["serve", str(MODEL), "--port", "0", "--json", "--kv-memory", "32MiB"]
    with subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *options],
        env={**environment, "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            events = iter(server.stderr)
            told: dict[str, Any] = {}
            while not {"listening", "ready"} <= set(told):  # in either order
                event = json.loads(next(events))
                told[event["event"]] = event
            assert told["ready"]["bundle"] == "hit"
            asked = {"model": "demo_model", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
            answer = httpx.post(f"{told['listening']['url']}/v1/completions", json=asked, timeout=60).json()
            assert answer["choices"][0]["text"].strip() == EXPECTED
            server.send_signal(signal.SIGTERM)
            last = [line for line in events if line.strip()][-1]
            assert json.loads(last) == {"code": 0, "banned": []}
        finally:
            server.kill()


@pytest.fixture
def module(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setenv("PIECEWORK_HOME", environment["PIECEWORK_HOME"])
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    return layers.eval().requires_grad_(requires_grad=False)


def test_any_module(module: nn.Module, tmp_path: Path) -> None:
    sizes = {"tokens": piecework.Dim(1, 64)}
    bundle = piecework.compile(module, (torch.randn(10, 16),), dynamic=sizes, out=tmp_path / "module.pwb")
    model = piecework.load(bundle, weights=module)
    for tokens in (1, 3, 64):
        x = torch.randn(tokens, 16)
        torch.testing.assert_close(model(x), module(x))


def test_torch_compile(module: nn.Module) -> None:
    torch._dynamo.reset()
    run = torch.compile(module, backend="piecework", dynamic=True)
    with torch.no_grad():
        for tokens in (10, 3, 64):
            x = torch.randn(tokens, 16)
            torch.testing.assert_close(run(x), module(x))
