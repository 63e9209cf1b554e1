import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from piecework.bundle import Bundle
from piecework.cli import main as main_module
from piecework.cli.main import COMMANDS, main
from piecework.errors import StoreError, UnsupportedModelError

Write = Callable[..., Bundle]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Replace the command `doctor` by a function."""

    def install(run: Callable[[], int]) -> None:
        def add_parser(subparsers: Any) -> None:
            subparsers.add_parser("doctor").add_argument("--json", action="store_true")

        command = SimpleNamespace(add_parser=add_parser, run=lambda args: run())
        monkeypatch.setattr(main_module.importlib, "import_module", lambda name: command)

    return install


def raising(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"    {name}" in text
    assert "exit codes: 0 done, 1 failed" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: piecework {name}" in text
    assert "--json" in text
    assert "--debug" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("piecework 0.")


@pytest.mark.parametrize("arguments", [[], ["nosuch"], ["inspect"], ["inspect", "b", "--nosuch"], ["--nosuch"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: piecework" in capsys.readouterr().err


def test_help_imports_neither_torch_nor_a_command() -> None:
    code = (
        "import sys\n"
        "from piecework.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch', 'transformers', 'numpy', 'rich', 'sympy'}, loaded\n"
        "commands = {name for name in sys.modules if name.startswith('piecework.cli.')}\n"
        "assert commands == {'piecework.cli.main', 'piecework.cli.console', 'piecework.cli.command_parser'}, commands\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "piecework", "inspect", str(tmp_path / "none")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["piecework", "asked", "found", "try"]


def test_the_exit_code_is_the_commands(fake: Any) -> None:
    fake(lambda: 1)
    assert main(["doctor"]) == 1
    fake(lambda: 0)
    assert main(["doctor"]) == 0


def test_our_errors(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake(raising(UnsupportedModelError(asked="a", found="f", try_="t")))
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "piecework: UnsupportedModelError\nasked: a\nfound: f\ntry:   t\n"
    assert captured.out == ""
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "UnsupportedModelError"


@pytest.mark.parametrize("arguments", [["doctor", "--debug"], ["--debug", "doctor"]])
def test_debug_shows_the_traceback(arguments: list[str], fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake(raising(StoreError(asked="a", found="f")))
    assert main(arguments) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "name", "found"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "StoreError", "no space left"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "StoreError", "/x"),
        (OSError(errno.EIO, "Input/output error"), "PieceworkError", "OSError"),
        (ZeroDivisionError("division"), "PieceworkError", "ZeroDivisionError: division"),
        (AssertionError("broken"), "PieceworkError", "AssertionError: broken"),
    ],
)
def test_other_errors(error: Exception, name: str, found: str, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake(raising(error))
    assert main(["doctor", "--json"]) == 1
    captured = capsys.readouterr()
    value = json.loads(captured.out)
    assert value["error"] == name
    assert found in value["found"]
    assert value["asked"] == "piecework doctor --json"
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_unwinds(
    number: int, fake: Any, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    if number == signal.SIGINT:  # a shell's background jobs ignore it
        old = signal.signal(signal.SIGINT, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, old))
    unwound = []

    def run() -> int:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            unwound.append(True)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    fake(run)
    assert main(["doctor"]) == 1
    assert unwound == [True]
    assert capsys.readouterr().err == "piecework: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_leaves() -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m piecework doctor --json | true"],
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_inspect(tmp_path: Path, write_sample: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write_sample(tmp_path / "b")
    assert main(["inspect", str(tmp_path / "b")]) == 0
    assert "3, of which 2 unique" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "b"), "--verify", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verified"] is True
    assert captured.err == ""


def test_inspect_an_archive(
    tmp_path: Path, write_sample: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "store"))
    write_sample(tmp_path / "b.pwb")
    assert main(["inspect", str(tmp_path / "b.pwb"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_pieces"] == 3


def test_inspect_verify_finds_a_changed_artifact(
    tmp_path: Path, write_sample: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_sample(tmp_path / "b").root
    artifact = next((root / "artifacts").iterdir())
    artifact.write_bytes(b"F" + artifact.read_bytes()[1:])
    assert main(["inspect", str(tmp_path / "b")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "b"), "--verify", "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["error"] == "CorruptBundle"
    assert artifact.name in value["found"]


def test_doctor_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["doctor", "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["usable"] is False
    checks = {check["name"]: check for check in value["checks"]}
    assert checks["C++ compiler"]["status"] == "missing"
    assert checks["python"]["status"] == "ok"
    assert main(["doctor"]) == 1
    assert "no-such-compiler" in capsys.readouterr().out


def test_every_command_has_a_module() -> None:
    for name in COMMANDS:
        assert importlib.util.find_spec(f"piecework.cli.{name}") is not None, name
