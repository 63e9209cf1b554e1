import io
import json
from pathlib import Path

import pytest

from piecework.cli import console
from piecework.errors import StaleBundle


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_results_and_remarks_go_their_ways(capsys: pytest.CaptureFixture[str]) -> None:
    console.out("result", end="")
    console.status("remark")
    console.table([("layers", "4")])
    captured = capsys.readouterr()
    assert captured.out == "result"
    assert captured.err == "remark\nlayers  4\n"


def test_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.out_json({"path": Path("/x"), "rows": (1, 2)})
    captured = capsys.readouterr().out
    assert captured.count("\n") == 1
    assert json.loads(captured) == {"path": "/x", "rows": [1, 2]}
    with pytest.raises(TypeError, match="JSON"):
        console.out_json(object())


def test_table() -> None:
    rows = [("piecework", "4", "20.5"), ("eager", "80", "1.25")]
    assert console.format_table(rows, header=("system", "layers", "seconds")).splitlines() == [
        "system     layers  seconds",
        "---------  ------  -------",
        "piecework       4     20.5",
        "eager          80     1.25",
    ]
    assert console.format_table([("a", "1 s"), ("long", "2 s")]).splitlines() == ["a     1 s", "long  2 s"]
    assert console.format_table([]) == ""
    assert console.format_table([], header=("a", "b")).splitlines() == ["a  b", "-  -"]


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    error = StaleBundle(asked="a", found="f", try_="t")
    console.show_error(error, as_json=False)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["piecework: StaleBundle", "asked: a", "found: f", "try:   t"]
    console.show_error(error, as_json=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"error": "StaleBundle", "asked": "a", "found": "f", "try": "t"}
    assert "asked: a" in captured.err


def test_progress_in_a_file_is_a_line_per_stage() -> None:
    stream = io.StringIO()
    with console.progress(stream) as display:
        display.update("capture")
        display.update("capture")
        display.update("compile", done=1, total=3)
        display.update("compile", done=2, total=3)
    assert stream.getvalue().splitlines() == ["capture", "[1/3] compile", "[2/3] compile"]


def test_progress_on_a_terminal_leaves_nothing_and_survives_markup() -> None:
    stream = Terminal()
    with console.progress(stream) as display:
        display.update("capture")
        display.update("compile [/red] piece", done=1, total=3)
        assert stream.getvalue() != ""
    with pytest.raises(ZeroDivisionError), console.progress(stream):
        raise ZeroDivisionError
