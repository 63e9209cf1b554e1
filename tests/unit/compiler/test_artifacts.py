"""Artifacts are compiled once, whoever else needs them at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from piecework.bundle.record import Recorder
from piecework.bundle.store.directory import DirectoryStore
from piecework.bundle.store.interface import MemoryStore, Store
from piecework.compiler.artifacts import compile_artifacts
from piecework.compiler.backends.backend import Backend, EagerBackend, OnEvent, OnMade
from piecework.compiler.job import Job
from piecework.compiler.setup import CompileSetup
from piecework.errors import CompileError, ShapeContractError
from piecework.foundation.target import read_target
from piecework.ops.ir.program import Call, Program, TensorSpec
from piecework.spec.compile_options import BackendName, CompileOptions

OPTIONS = CompileOptions(backend=BackendName.EAGER)


@dataclass(frozen=True)
class Piece:
    """A piece of some calls."""

    num_calls: int
    primary: str | None = None
    pack: Mapping[int, str] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        calls = tuple(Call("aten.neg.default", ({"i": 0},), {}) for _ in range(self.num_calls))
        return Program((), (TensorSpec((2,), (1,), "float32", "cpu"),), (), calls, ({"n": 0},))


class SlowBackend(Backend):
    """The eager one, which takes its time, and is told before and after each job."""

    def __init__(self, scratch: Path, *, before: Callable[[str], None] = lambda _: time.sleep(0.03)) -> None:
        scratch.mkdir()
        self._eager = EagerBackend(scratch=scratch)
        self._before = before
        self.compiled: list[str] = []

    def compile(
        self, jobs: Mapping[str, Job], *, on_event: OnEvent, on_made: OnMade
    ) -> Mapping[str, ShapeContractError]:
        for name, job in jobs.items():
            self._before(name)
            self.compiled.append(name)
            self._eager.compile({name: job}, on_event=on_event, on_made=on_made)
        return {}

    def close(self) -> None:
        pass


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    place = tmp_path / "home"
    place.mkdir(mode=0o700)
    return DirectoryStore(place) if request.param == "directory" else MemoryStore(place)


def setup(store: Store, backend: Backend) -> CompileSetup:
    return CompileSetup(OPTIONS, backend, store, read_target(), Recorder())


def test_of_many_that_need_the_same_each_is_compiled_by_one(store: Store, tmp_path: Path) -> None:
    pieces = [Piece(n) for n in range(1, 7)]
    orders = [pieces, pieces[::-1], pieces[3:] + pieces[:3], pieces[:4]]
    backends = [SlowBackend(tmp_path / str(n)) for n in range(len(orders))]
    setups = [setup(store, backend) for backend in backends]
    made: list[int] = []

    def work(n: int) -> None:
        made.append(len(compile_artifacts(orders[n], setups[n], declared=None)))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [4, 6, 6, 6]
    compiled = [name for backend in backends for name in backend.compiled]
    assert len(compiled) == len(set(compiled)) == 6
    counts = [one.recorder.finish().counts for one in setups]
    assert sum(count["compiled"] for count in counts) == 6
    assert sum(count["store_hits"] for count in counts) == 22 - 6


def test_what_is_ready_is_in_the_store_before_the_rest_is(store: Store, tmp_path: Path) -> None:
    stored: list[int] = []
    backend = SlowBackend(tmp_path / "s", before=lambda _: stored.append(len(store.items())))
    compile_artifacts([Piece(n) for n in range(1, 5)], setup(store, backend), declared=None)
    assert stored == [0, 1, 2, 3]


def test_what_one_fails_with_another_tries(store: Store, tmp_path: Path) -> None:
    begun = threading.Event()

    def fail(_: str) -> None:
        begun.set()
        time.sleep(0.1)
        raise CompileError(asked="a", found="it failed")

    def work() -> None:
        with pytest.raises(CompileError):
            compile_artifacts([Piece(1)], setup(store, SlowBackend(tmp_path / "one", before=fail)), declared=None)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(10)
    second = SlowBackend(tmp_path / "two")
    compile_artifacts([Piece(1)], setup(store, second), declared=None)
    thread.join()
    assert len(second.compiled) == 1
