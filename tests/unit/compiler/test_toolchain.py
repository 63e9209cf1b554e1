"""Compilers that are missing or fail, and workers that die: our errors, nothing left behind."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import piecework
from piecework.compiler.artifacts import _job
from piecework.compiler.backends.pool import WorkerPool
from piecework.compiler.backends.toolchain import Toolchain, find_toolchain, flags_of, libraries_of, sources_of
from piecework.compiler.job import Job
from piecework.errors import CompileError, PieceworkError
from piecework.foundation.target import read_target
from piecework.foundation.watch import watched
from piecework.ops.ir.program import Call, Program, TensorSpec
from piecework.spec.compile_options import CompileOptions
from tests.choice import slow_but
from tests.unit.capture.graphs import Mlp
from tests.unit.models.tiny import write_config

X = TensorSpec(("s0", 8), (8, 1), "float32", "cpu")
GOOD = Program((("s0", 1, 64),), (X,), (), (Call("aten.silu.default", ({"i": 0},), {}),), ({"n": 0},))
BAD = Program((("s0", 1, 64),), (X,), (), (Call("aten.no_such_op.default", ({"i": 0},), {}),), ({"n": 0},))


def script(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A compiler that knows its version and fails at everything else."""
    return script(
        tmp_path / "g++", 'case "$*" in *--version*) echo "g++ 99";; *) echo "fatal error: no" >&2; exit 1;; esac\n'
    )


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A compiler that knows its version and takes for ever over everything else."""
    text = f'case "$*" in *--version*) echo "g++ 99";; *) echo $$ >> {tmp_path}/pids; sleep 60;; esac\n'
    return script(tmp_path / "g++", text)


def running(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.append(pid)
    return found


def eventually(condition: Callable[[], bool], *, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def members(group: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[2]) == group:
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Path], WorkerPool]]:
    """Return a function that starts a pool with a compiler; it is closed after the test and must leave no process."""
    made: list[WorkerPool] = []

    def begin(compiler: Path) -> WorkerPool:
        (tmp_path / "scratch").mkdir()
        pool = WorkerPool(
            toolchain=Toolchain(root=tmp_path / "toolchain", compiler=str(compiler), version="99"),
            scratch=tmp_path / "scratch",
            target=read_target(),
            jobs=2,
            **({"device": "cpu"} if "device" in WorkerPool.__init__.__annotations__ else {}),
        )
        made.append(pool)
        return pool

    yield begin
    for pool in made:
        pool.close()
        assert eventually(lambda pool=pool: members(pool._process.pid) == [])


def ignore(*_: object) -> None:
    pass


def test_code_for_lesser_cpus_is_compiled_without_other_instructions(tmp_path: Path) -> None:
    said, compiler = tmp_path / "said", tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    compiler.chmod(0o755)
    toolchain = Toolchain(tmp_path / "root", str(compiler), "1", machine=("-march=x86-64-v3",))
    toolchain.compile_kernel(tmp_path / "a.cpp", macros=(), target=tmp_path / "a.so")
    toolchain.runtime(("-march=native", "-mavx512f", "-DX"), interface="")
    words = said.read_text().split()
    assert [word for word in words if word.startswith("-m")] == 2 * ["-march=x86-64-v3"]
    assert "-DX" in words


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match=r"none of g\+\+"):
        find_toolchain(tmp_path, compiler=None)
    with pytest.raises(CompileError, match="none of /no/such"):
        find_toolchain(tmp_path, compiler="/no/such")


def test_a_compiler_that_does_not_run(tmp_path: Path) -> None:
    failing = script(tmp_path / "g++", "echo dead >&2; exit 1\n")
    with pytest.raises(CompileError, match="dead"):
        find_toolchain(tmp_path, compiler=str(failing))


def test_a_failing_prefix_leaves_nothing(tmp_path: Path, broken: Path) -> None:
    toolchain = find_toolchain(tmp_path / "root", compiler=str(broken))
    with pytest.raises(CompileError, match="fatal error: no"):
        toolchain.prefix(("-O2",))
    assert [p for p in (tmp_path / "root").rglob("*") if p.is_file()] == []
    assert [p.name for p in (tmp_path / "root").iterdir() if p.name.startswith(".")] == []


def test_a_compiler_that_fails_is_our_error_and_leaves_nothing(
    tmp_path: Path, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("PIECEWORK_HOME", str(home))
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(CompileError):
        piecework.compile(Mlp(), (torch.ones(3, 8),), dynamic={"rows": piecework.Dim(1, 64)}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    left = [p for p in home.rglob("*") if p.is_file()]
    assert left == []


@pytest.mark.slow
def test_a_compiler_that_hangs_is_reported(
    start: Callable[[Path], WorkerPool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("piecework.compiler.backends.pool.watched", functools.partial(watched, report_s=0.2))
    pool = start(script(tmp_path / "g++", "sleep 1000\n"))

    def run() -> None:
        with pytest.raises(CompileError, match="ended early"):
            pool.run({"good": Job(program=GOOD)}, on_event=ignore, on_made=ignore)

    thread = threading.Thread(target=run)
    thread.start()
    assert eventually(lambda: "a piece of 1 operators is being compiled in process" in caplog.text, seconds=60)
    assert f"imported in process {pool._process.pid}" in caplog.text
    pool.close()
    thread.join()


def test_a_bad_program_is_reported(start: Callable[[Path], WorkerPool], broken: Path) -> None:
    pool = start(broken)
    with pytest.raises((PieceworkError, AssertionError), match="no_such_op"):
        pool.run({"bad": Job(program=BAD)}, on_event=ignore, on_made=ignore)


def test_a_worker_that_is_killed_is_our_error(start: Callable[[Path], WorkerPool], slow: Path, tmp_path: Path) -> None:
    pool = start(slow)

    def on_event(event: object) -> None:
        if event["event"] == "start":  # type: ignore[index]
            os.kill(pool._process.pid, signal.SIGKILL)

    begun = time.monotonic()
    with pytest.raises(CompileError, match="ended early"):
        pool.run({"good": Job(program=GOOD)}, on_event=on_event, on_made=ignore)
    assert time.monotonic() - begun < 45


def test_closing_ends_compilers(start: Callable[[Path], WorkerPool], slow: Path, tmp_path: Path) -> None:
    pool = start(slow)
    assert eventually(lambda: (tmp_path / "pids").exists(), seconds=30)
    pool.close()
    pids = [int(p) for p in (tmp_path / "pids").read_text().split()]
    assert eventually(lambda: running(pids) == [])
    assert [p.name for p in (tmp_path / "toolchain").iterdir() if p.name.startswith(".piecework")] == []


@pytest.mark.parametrize("number", slow_but([signal.SIGINT, signal.SIGTERM], signal.SIGINT))
def test_an_interrupt_ends_workers_and_compilers(tmp_path: Path, slow: Path, number: signal.Signals) -> None:
    model_dir = write_config(tmp_path / "model", "llama")
    home = tmp_path / "home"
    process = subprocess.Popen(
        [sys.executable, "-m", "piecework", "compile", str(model_dir), "--weights", "none", "--max-tokens", "64"],
        env={**os.environ, "PIECEWORK_HOME": str(home), "CXX": str(slow)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert eventually(lambda: (tmp_path / "pids").exists(), seconds=60)
        children = [int(c) for c in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1, said
    assert "Traceback" not in said
    pids = [int(p) for p in (tmp_path / "pids").read_text().split()]
    assert eventually(lambda: running(pids + children) == [])
    assert all(members(c) == [] for c in children)
    assert [p for p in home.rglob("*") if p.is_file()] == []


@pytest.mark.slow
def test_two_processes_compile_the_same_model_at_once(tmp_path: Path) -> None:
    model_dir = write_config(tmp_path / "model", "llama")
    command = [sys.executable, "-m", "piecework", "compile", str(model_dir), "--weights", "none", "--backend", "eager"]
    environment = {**os.environ, "PIECEWORK_HOME": str(tmp_path / "home")}
    both = [
        subprocess.Popen(
            [*command, "--json"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert sum('"cached": true' in out for out, _ in outputs) == 1
    assert len(list((tmp_path / "home" / "bundles").iterdir())) == 1


def test_flags_libraries_and_sources_of_a_command() -> None:
    command = (
        "g++ a/x.wrapper.cpp -D NDEBUG -fPIC -O3 -march=native -I/t/include -I/u/python3.11 -L/t/lib -ltorch -o x.o"
    )
    assert flags_of(command) == ("-DNDEBUG", "-march=native", "-I/t/include")
    assert libraries_of(command) == ("-L/t/lib", "-ltorch")
    assert sources_of(command) == [Path("a/x.wrapper.cpp")]


def test_a_compilers_name_that_is_no_command(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="no command"):
        find_toolchain(tmp_path, compiler="'")


def test_a_changed_setting_of_torchs_compiler_is_another_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = SimpleNamespace(program=GOOD, primary=None, pack={})

    def key() -> str:
        return _job(piece, bounds=None, options=CompileOptions(), target=read_target()).key()

    plain = key()
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "3")
    assert key() == plain
    monkeypatch.setenv("TORCHINDUCTOR_EMULATE_PRECISION_CASTS", "1")
    assert key() != plain
