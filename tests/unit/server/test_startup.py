"""Bringing a model up: warm, cold, cold with the eager backend meanwhile, and all that can go wrong."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

import piecework.engine.loading
import piecework.engine.opening
from piecework.engine.bundles import FoundBundle
from piecework.engine.loading import Loaded
from piecework.engine.options import EngineOptions, WhileCompiling
from piecework.engine.request import GenerationRequest
from piecework.engine.sampling_params import SamplingParams
from piecework.engine.text.tokenizer import load_tokenizer
from piecework.errors import CompileError, UnsupportedModelError, WeightsError
from piecework.foundation.environment import Environment
from piecework.server.log import EventLog
from piecework.server.settings import ServerSettings
from piecework.server.startup import ModelStart
from piecework.server.status import ServerStatus, State
from piecework.spec.model_spec import ModelSpec
from tests.unit.engine.letters import write_letters
from tests.unit.engine.paged_model import EOS, POSITIONS, VOCAB, PagedModel, alone
from tests.unit.models.tiny import write_config
from tests.unit.server.live import eventually, live_server


class ScriptedProcess:
    """A compile that goes on when it is told to, and says so."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.begun = threading.Event()
        self.stopped = False
        self.error: Exception | None = None

    def stop(self) -> None:
        self.stopped = True
        self.go_on.set()


class SlowModel(PagedModel):
    """Takes some milliseconds a step, so that something can happen between two of them."""

    def run(self, inputs: Any) -> Any:
        time.sleep(0.005)
        return super().run(inputs)


class World:
    """What a start finds: the store's bundles by backend, the compiles by backend, and the models that were loaded."""

    def __init__(self) -> None:
        self.stored: set[str] = set()
        self.processes = {"aoti": ScriptedProcess(), "eager": ScriptedProcess()}
        self.loaded: list[PagedModel] = []
        self.num_blocks = 40

    def find(self, wanted: ModelSpec, **_: Any) -> FoundBundle | None:
        backend = wanted.options.backend.value
        return self._bundle(backend, compiled=False) if backend in self.stored else None

    def compile_process(self, wanted: ModelSpec, **_: Any) -> ScriptedProcess:
        backend = wanted.options.backend.value
        process = self.processes[backend]
        process.backend = backend
        return process

    def run_compile(self, process: ScriptedProcess, *, on_line: Any) -> FoundBundle:
        process.begun.set()
        on_line("capturing")
        on_line("[1/3] compiling")
        assert process.go_on.wait(20)
        if process.stopped:
            raise CompileError(asked="compile", found="it was stopped")
        if process.error is not None:
            raise process.error
        return self._bundle(process.backend, compiled=True)

    def load_model(self, bundle: Any, spec: ModelSpec, options: EngineOptions, *, on_event: Any) -> Loaded:
        model = SlowModel(block_size=16)
        model.plan = SimpleNamespace(states=(), sizes={"tokens": (1, 1000), "seqs": (1, 1000)})
        self.loaded.append(model)
        return Loaded(model, self.num_blocks)

    def _bundle(self, backend: str, *, compiled: bool) -> FoundBundle:
        return FoundBundle(SimpleNamespace(name=backend), compiled=compiled, verify_s=0.0)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    for name in ("find", "run_compile"):
        monkeypatch.setattr(piecework.engine.opening, name, getattr(world, name))
    monkeypatch.setattr(piecework.engine.opening, "CompileProcess", world.compile_process)
    monkeypatch.setattr(piecework.engine.loading, "load_model", world.load_model)
    return world


@pytest.fixture
def make(world: World, tmp_path: Path):
    write_config(tmp_path, "llama", vocab_size=VOCAB, max_position_embeddings=POSITIONS, eos_token_id=EOS)
    write_letters(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    made = []

    def make(**options: Any) -> SimpleNamespace:
        status, log, failed = ServerStatus(), io.StringIO(), threading.Event()
        start = ModelStart(
            ModelSpec.of(tmp_path),
            EngineOptions(**options),
            environment=Environment(store_root=tmp_path / "home"),
            status=status,
            log=EventLog(log),
            failed=failed,
        )
        made.append(start)
        start.begin()
        return SimpleNamespace(start=start, status=status, log=log, failed=failed, directory=tmp_path)

    yield make
    for start in made:
        start.stop()


def _text(status: ServerStatus, *, length: int = 5) -> list[int]:
    params = SamplingParams(max_tokens=length, ignore_eos=True)

    async def collect() -> list[int]:
        service = status.service
        assert service is not None
        request = GenerationRequest(f"r{id(params)}", (5, 6, 7), params)
        return [delta.tokens[0].token async for delta in service.stream(request)]

    return asyncio.run(collect())


def _piece(line: str) -> str:
    return json.loads(line.removeprefix("data: "))["choices"][0]["text"]


def _expected(length: int = 5) -> list[int]:
    return alone(GenerationRequest("r", (5, 6, 7), SamplingParams(max_tokens=length, ignore_eos=True)))["r", 0]


def test_warm(world, make):
    world.stored = {"aoti"}
    run = make()
    assert eventually(lambda: run.status.state is State.READY)
    assert (run.status.bundle.hit, run.status.bundle.backend) == (True, "aoti")
    assert _text(run.status) == _expected()
    wanted = {"import torch", "tokenizer", "bundle", "read weights ahead", "KV cache"}
    # the weights are read ahead beside all else, and nothing waits for that
    assert eventually(lambda: wanted <= {phase.name for phase in run.status.phases if phase.end_s is not None})
    assert "ready" in run.log.getvalue()
    assert "bundle=hit" in run.log.getvalue()


def test_the_longest_sequence_is_what_the_cache_holds(world, make):
    world.stored, world.num_blocks = {"aoti"}, 2
    run = make()
    assert eventually(lambda: run.status.service is not None)
    assert run.status.service.max_positions == 32


def test_cold_waits_and_says_why_and_how_far(world, make):
    run = make()
    assert eventually(lambda: run.status.compiling is not None and run.status.compiling.total == 3)
    assert run.status.state is State.COMPILING
    assert run.status.service is None
    progress = run.status.compiling
    assert (progress.reason, progress.backend) == ("no bundle of this model in the store", "aoti")
    assert (progress.stage, progress.done, progress.total) == ("compiling", 1, 3)
    world.processes["aoti"].go_on.set()
    assert eventually(lambda: run.status.state is State.READY)
    assert run.status.bundle.hit is False
    assert run.status.compiling is None
    assert "bundle_missing" in run.log.getvalue()
    assert "stage=compiling done=1 total=3" in run.log.getvalue()


def test_eager_serves_meanwhile_and_nobody_notices_the_switch(world, make):
    run = make(while_compiling=WhileCompiling.EAGER)
    assert world.processes["eager"].begun.wait(20)
    assert run.status.service is None
    world.processes["eager"].go_on.set()
    assert eventually(lambda: run.status.service is not None)
    assert world.processes["aoti"].begun.wait(20)
    assert eventually(lambda: run.status.compiling is not None and run.status.compiling.backend == "aoti")
    assert (run.status.state, run.status.bundle.backend) == (State.COMPILING, "eager")
    with live_server(run.status, ServerSettings(model_names=("m",))) as url:
        assert httpx.get(f"{url}/health").json() == {"status": "compiling", "serving": "eager", "message": ""}
        asked = {
            "model": "m",
            "prompt": [5, 6, 7],
            "max_tokens": 80,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        with httpx.stream("POST", f"{url}/v1/completions", json=asked) as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
            texts = [_piece(next(lines))]
            world.processes["aoti"].go_on.set()
            assert eventually(lambda: run.status.bundle.backend == "aoti")
            texts += map(_piece, lines)
        assert "".join(texts) == load_tokenizer(run.directory).decode(_expected(80))
        assert httpx.get(f"{url}/health").json()["status"] == "ready"
    eager, native = world.loaded
    assert eager.closed
    assert not native.closed
    assert _text(run.status, length=20) == _expected(20)
    assert "switched" in run.log.getvalue()


def test_a_stored_eager_bundle_serves_at_once(world, make):
    world.stored = {"eager"}
    run = make(while_compiling=WhileCompiling.EAGER)
    assert eventually(lambda: run.status.service is not None)
    assert not world.processes["eager"].begun.is_set()
    assert _text(run.status) == _expected()


def test_a_native_compile_that_fails_leaves_eager_serving(world, make):
    world.stored = {"eager"}
    run = make(while_compiling=WhileCompiling.EAGER)
    process = world.processes["aoti"]
    process.error = CompileError(asked="compile", found="no room on the disk")
    assert process.begun.wait(20)
    process.go_on.set()
    assert eventually(lambda: "no room on the disk" in run.log.getvalue())
    assert eventually(lambda: run.status.state is State.READY)
    assert run.status.bundle.backend == "eager"
    assert _text(run.status) == _expected()
    assert not run.failed.is_set()


def test_a_compile_that_fails_ends_the_server(world, make):
    run = make()
    process = world.processes["aoti"]
    process.error = CompileError(asked="compile", found="no compiler")
    process.go_on.set()
    assert run.failed.wait(20)
    assert run.status.state is State.FAILED
    assert isinstance(run.start.error, CompileError)
    assert "no compiler" in run.status.failure


def test_without_weights_nothing_is_compiled(world, make, tmp_path):
    run = make(random_weights=1)  # they aren't needed then
    assert world.processes["aoti"].begun.wait(20)
    run.start.stop()
    world.processes["aoti"].begun.clear()
    (tmp_path / "model.safetensors").unlink()
    run = make()
    assert run.failed.wait(20)
    assert isinstance(run.start.error, WeightsError)
    assert not world.processes["aoti"].begun.is_set()


def test_without_a_tokenizer_nothing_is_compiled(world, make, tmp_path):
    (tmp_path / "tokenizer.json").unlink()
    run = make()
    assert run.failed.wait(20)
    assert isinstance(run.start.error, UnsupportedModelError)
    assert not world.processes["aoti"].begun.is_set()


@pytest.mark.parametrize("meanwhile", list(WhileCompiling))
def test_stopping_ends_the_compile(world, make, meanwhile):
    world.stored = {"eager"}
    run = make(while_compiling=meanwhile)
    assert world.processes["aoti"].begun.wait(20)
    run.start.stop()
    assert world.processes["aoti"].stopped
    assert not run.failed.is_set()
    assert run.start.error is None
