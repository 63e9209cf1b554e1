"""Children end with their parent, compilers included; nothing is imported from the directory one stands in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import piecework
from piecework.foundation.process import python_command

MODEL = Path(piecework.__file__).parent / "demo_model"
DEADLINE_S = 60


def descendants(pid: int) -> dict[int, str]:
    """Return the processes that a process has started, directly or not, with their names."""
    found: dict[int, str] = {}
    try:
        children = [
            int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()
        ]
    except OSError:
        return found
    for child in children:
        try:
            found[child] = Path(f"/proc/{child}/comm").read_text().strip()
        except OSError:
            continue
        found |= descendants(child)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def generate(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A start whose bundle is being compiled, with nothing compiled before."""
    environment = {**os.environ, "PIECEWORK_HOME": str(tmp_path / "home")}
    command = python_command("piecework", "generate", str(MODEL), "--prompt", "x", "--max-new-tokens", "1")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("killed", ["generate", pytest.param("compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize("busy", ["cc1plus", pytest.param("python", marks=pytest.mark.slow)])
def test_whoever_is_killed_leaves_nobody(generate: subprocess.Popen[bytes], killed: str, busy: str) -> None:
    begun = time.monotonic()
    while True:
        known = descendants(generate.pid)
        if any(name.startswith(busy) for name in known.values()) and len(known) >= 2:
            break
        assert generate.poll() is None
        assert time.monotonic() - begun < DEADLINE_S
        time.sleep(0.05)
    victim = generate.pid if killed == "generate" else next(iter(known))
    os.kill(victim, signal.SIGKILL)
    begun = time.monotonic()
    while left := {pid: name for pid, name in known.items() if pid != victim and alive(pid)}:
        assert time.monotonic() - begun < DEADLINE_S, f"still there: {left}"
        time.sleep(0.05)


@pytest.mark.slow
def test_nothing_is_imported_from_the_current_directory(tmp_path: Path) -> None:
    """A downloaded model's directory may hold files of any name."""
    names = ("json", "torch", "safetensors", "transformers", "numpy", "tokenizers", "argparse", "piecework")
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the current directory was run')")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        if (MODEL / name).exists():
            (tmp_path / name).symlink_to(MODEL / name)
    environment = {**os.environ, "PIECEWORK_HOME": str(tmp_path / "home")}
    environment.pop("PYTHONPATH", None)
    command = [str(Path(sys.executable).with_name("piecework")), "generate", ".", "--prompt", "The for statement"]
    command += ["--max-new-tokens", "2", "--backend", "eager"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    worker = python_command("piecework.compiler.backends.worker", "--help")
    done = subprocess.run(worker, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "piecework.py").unlink()  # `-m` itself looks for the package there
    by_module = [sys.executable, "-m", "piecework", *command[1:]]
    done = subprocess.run(by_module, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
