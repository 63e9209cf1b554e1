"""`piecework demo`, with a stand-in for the commands that it runs."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from piecework.cli import demo
from piecework.cli.main import main
from piecework.errors import CompileError, StoreError

PYTHON = sys.executable  # before a test replaces it
COMPILED = {
    "bundle": "/b",
    "layers": 6,
    "pieces": 7,
    "unique_pieces": 3,
    "import_s": 0.25,
    "capture_s": 1.0,
    "compile_s": 2.0,
    "seal_s": 0.5,
    "cold_s": 3.5,
}
GENERATED = {"text": " iterate", "token_ids": [1], "load_ms": 4.25, "first_token_s": 1.5, "tokens_per_s": 640.0}


@pytest.fixture
def commands(tmp_path, monkeypatch) -> Path:
    """Stand in for `python -m piecework ...`: note how it was called, then print figures or fail as told."""
    stub = tmp_path / "python"
    stub.write_text(
        f"""#!{sys.executable} -S
import os, sys, time
with open({str(tmp_path / "calls")!r}, "a") as file:
    print(*sys.argv[1:], "@", os.environ["PIECEWORK_HOME"], file=file)
what = sys.argv[4]
told = {str(tmp_path)!r} + "/" + what
if os.path.exists(told + ".wait"):
    time.sleep(60)
if os.path.exists(told + ".fail"):
    sys.exit(1)
print({{"compile": {json.dumps(COMPILED)!r}, "generate": {json.dumps(GENERATED)!r}}}[what])
"""
    )
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    return tmp_path


def calls(commands: Path) -> list[str]:
    return (commands / "calls").read_text().splitlines()


def left(commands: Path) -> list[Path]:
    return list((commands / "home" / "scratch").iterdir())


def test_it_compiles_then_generates_on_one_new_store(commands, capsys):
    assert main(["demo", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["compile"] == COMPILED
    assert printed["generate"] == GENERATED
    first, second = calls(commands)
    assert first.startswith("-P -m piecework compile ")
    assert second.startswith("-P -m piecework generate ")
    assert first.rsplit("@ ", 1)[1] == second.rsplit("@ ", 1)[1] == printed["store"]
    assert Path(printed["store"]).parent == commands / "home" / "scratch"
    assert left(commands) == []


def test_the_table_has_every_figure(commands, capsys):
    assert main(["demo"]) == 0
    shown = capsys.readouterr().out
    assert demo.PROMPT + " iterate" in shown
    for value in ("6", "7", "3", "0.25 s", "1.00 s", "2.00 s", "0.50 s", "3.50 s", "4.2 ms", "1.50 s", "640"):
        assert f" {value}\n" in shown
    assert "removed; --keep DIR keeps it" in shown


@pytest.mark.parametrize("what", ["compile", "generate"])
def test_a_failed_command_leaves_no_store_behind(commands, capsys, what):
    (commands / f"{what}.fail").touch()
    assert main(["demo"]) == 1
    assert CompileError.__name__ in capsys.readouterr().err
    assert left(commands) == []


def test_an_interrupt_ends_the_command_and_removes_the_store(commands):
    (commands / "compile.wait").touch()
    code = (
        f"import sys; from piecework.cli.main import main; sys.executable = {str(commands / 'python')!r}; "
        "sys.exit(main(['demo']))"
    )
    child = subprocess.Popen([PYTHON, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (commands / "calls").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 1
    assert "interrupted" in said
    assert left(commands) == []


def test_keep_wants_an_empty_directory(commands, tmp_path, capsys):
    place = tmp_path / "mine"
    assert main(["demo", "--keep", str(place), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["store"] == str(place)
    assert place.exists()
    (place / "something").touch()
    assert main(["demo", "--keep", str(place)]) == 1
    assert StoreError.__name__ in capsys.readouterr().err
    assert (place / "something").exists()


def test_a_given_store_is_used_and_stays_when_the_demo_fails(commands, tmp_path):
    place = tmp_path / "store"
    place.mkdir()
    (commands / "compile.fail").touch()
    assert main(["demo", "--store", str(place)]) == 1
    assert place.exists()
    assert calls(commands)[0].endswith(f"@ {place}")
