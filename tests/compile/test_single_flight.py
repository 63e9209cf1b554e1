"""Starts that need the same at once: one compiles, the others wait, are told, overtake and can be interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import piecework
from piecework.bundle import DirectoryStore
from piecework.foundation.leases import Lease
from piecework.foundation.process import python_command
from piecework.spec.compile_options import BackendName
from piecework.spec.model_spec import ModelSpec
from tests.choice import slow_but

MODEL = Path(piecework.__file__).parent / "demo_model"
DEADLINE_S = 60
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a command on the test's store, with an empty TMPDIR."""
    started: list[subprocess.Popen[str]] = []
    (tmp_path / "tmp").mkdir()

    def begin(*words: str, overtake_s: str = "600") -> subprocess.Popen[str]:
        places = {"PIECEWORK_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
        environment = {**os.environ, **places, "PIECEWORK_OVERTAKE_S": overtake_s}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(python_command("piecework", *words), env=environment, text=True, **pipes)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def compile_words(*more: str) -> tuple[str, ...]:
    return ("compile", str(MODEL), "--weights", "none", "--json", *more)


def figures(process: subprocess.Popen[str]) -> dict[str, object]:
    printed, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said
    found = json.loads(printed)
    assert isinstance(found, dict)
    return found


def wait_for(is_so: Callable[[], object], process: subprocess.Popen[str]) -> None:
    begun = time.monotonic()
    while not is_so():
        assert process.poll() is None
        assert time.monotonic() - begun < DEADLINE_S
        time.sleep(0.02)


def held(home: Path, spec: ModelSpec) -> Lease:
    """Compile the model in this process, as the others see it, without ever being done."""
    lease = DirectoryStore(home).lease(spec.key)
    assert isinstance(lease, Lease)
    return lease


def test_a_start_that_waits_can_be_interrupted_at_once_and_leaves_nothing(tmp_path: Path, start: Start) -> None:
    lease = held(tmp_path / "home", ModelSpec.of(MODEL, backend=BackendName.EAGER))
    process = start(*compile_words("--backend", "eager"))
    wait_for(lambda: list((tmp_path / "home").glob("scratch/*.lock")), process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert "interrupted" in said
    lease.release()
    assert [*tmp_path.glob("home/locks/*"), *tmp_path.glob("home/scratch/*"), *tmp_path.glob("tmp/*")] == []


@pytest.mark.slow
def test_one_that_hangs_is_overtaken_and_that_is_told(tmp_path: Path, start: Start) -> None:
    lease = held(tmp_path / "home", ModelSpec.of(MODEL, backend=BackendName.EAGER))
    process = start(*compile_words("--backend", "eager"), overtake_s="0.5")
    printed, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said
    assert f"doing here what process {os.getpid()} on " in said
    assert json.loads(printed)["cached"] is False
    lease.release()
    assert [*tmp_path.glob("home/locks/*"), *tmp_path.glob("home/scratch/*"), *tmp_path.glob("tmp/*")] == []


@pytest.mark.slow
def test_of_starts_that_write_bundles_of_their_own_one_compiles_each_artifact(tmp_path: Path, start: Start) -> None:
    outs = [tmp_path / f"bundle{n}" for n in range(2)]
    processes = [start(*compile_words("--backend", "eager", "--out", str(out))) for out in outs]
    compiled = [figures(process)["artifacts_compiled"] for process in processes]
    stored = len(list((tmp_path / "home" / "artifacts").iterdir()))
    assert sum(map(int, map(str, compiled))) == stored
    assert [*tmp_path.glob("home/locks/*"), *tmp_path.glob("home/scratch/*"), *tmp_path.glob("tmp/*")] == []


@pytest.mark.parametrize("how", slow_but([signal.SIGKILL, signal.SIGSTOP], seldom=[signal.SIGKILL]))
def test_a_compiler_that_dies_or_hangs_is_replaced(tmp_path: Path, start: Start, how: signal.Signals) -> None:
    """The first one compiles native artifacts when it is killed or stopped; the second one is done all the same."""
    first = start(*compile_words("--out", str(tmp_path / "first")))
    wait_for(lambda: len(list((tmp_path / "home").glob("locks/*.lock"))) >= 3, first)
    first.send_signal(how)
    second = start(*compile_words("--out", str(tmp_path / "second")), overtake_s="2")
    assert figures(second)["unique_pieces"] == 3
    first.kill()
    first.communicate()
    start("store", "verify").communicate(timeout=DEADLINE_S)
    assert [*tmp_path.glob("home/locks/*"), *tmp_path.glob("home/scratch/*"), *tmp_path.glob("tmp/*")] == []


@pytest.mark.slow
@pytest.mark.parametrize("words", [("generate", str(MODEL), "--prompt", "x", "--max-new-tokens", "1"), ("demo",)])
def test_nothing_stays_among_temporary_files(tmp_path: Path, start: Start, words: Sequence[str]) -> None:
    figures(start(*words, "--json"))
    assert [*tmp_path.glob("home/locks/*"), *tmp_path.glob("home/scratch/*"), *tmp_path.glob("tmp/*")] == []


def test_what_a_kill_left_the_next_start_removes(tmp_path: Path, start: Start) -> None:
    first = start("demo")
    scratch = tmp_path / "home" / "scratch"
    wait_for(lambda: list(scratch.glob(".piecework-*/scratch/*/")), first)
    first.kill()
    first.communicate()
    begun = time.monotonic()
    while list(scratch.iterdir()):
        assert time.monotonic() - begun < DEADLINE_S
        start("store", "ls").communicate(timeout=DEADLINE_S)
    assert [*tmp_path.glob("tmp/*")] == []
