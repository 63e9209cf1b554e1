"""The shape that all benchmarks have in common, and that all of them have it."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks
from benchmarks.common.main import Benchmark, add_option, names, numbers
from benchmarks.common.run import Run
from piecework.errors import PieceworkError

ROOT = Path(benchmarks.__file__).parent
NAMES = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "__init__")


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    if args.fail:
        raise PieceworkError(asked="a", found="nothing", try_="b")
    for number in range(args.repeats):
        run.add(float(number), system="piecework", metric="cold_s", layers=args.layers[-1], dtype="float32")
    run.add(5.0, system="vllm", metric="cold_s", layers=args.layers[-1], dtype="float32")
    run.compare(run.find(system="piecework")[0], 0.5, system="vllm")
    run.failed.update(args.failed)
    run.notes.append("something was odd")
    return {"layers": args.layers, "versions": {"vllm": "0.1"}}


def options(parser: argparse.ArgumentParser) -> None:
    add_option(parser, "--layers", (4, 80), "numbers", type_=numbers)
    add_option(parser, "--failed", (), "systems", type_=names(("piecework", "vllm")))
    parser.add_argument("--fail", action="store_true")


MADE = Benchmark("What it is.", measure, repeats=3, options=options)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_the_shape_and_a_row_in_the_readme(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = importlib.import_module(f"benchmarks.{name}").BENCHMARK
    with pytest.raises(SystemExit) as caught:
        made.run(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m benchmarks.{name} ")
    assert {"--repeats", "--out", "--plot"} <= set(shown.split())
    assert f"`python -m benchmarks.{name}" in (ROOT / "README.md").read_text()


def test_what_is_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert MADE.run(["--layers", "2,1,2", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["settings"] == {"layers": [1, 2], "repeats": 3}
    assert report["versions"]["vllm"] == "0.1"
    assert {"cpu", "isa", "cores"} <= report["machine"].keys()
    assert report["rows"][0] == {
        "system": "piecework", "layers": 2, "dtype": "float32", "metric": "cold_s", "value": 1, "unit": "s", "n": 3,
        "min": 0, "max": 2,
    }  # fmt: skip
    assert [goal["met"] for goal in report["goals"]] == [True]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["system", "layers", "dtype", "metric", "value", "unit", "n", "min", "max"]
    assert lines[2].split() == ["piecework", "2", "float32", "cold_s", "1", "s", "3", "0", "2"]
    assert lines[-2:] == ["cold_s ÷ vllm's = 0.2 (≤ 0.5: met)", "note: something was odd"]


def test_the_exit_code_says_whether_ours_failed() -> None:
    assert MADE.run(["--failed", "vllm"]) == 0
    assert MADE.run(["--failed", "piecework,vllm"]) == 1


def test_an_error_of_ours_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        MADE.run(["--fail"])
    assert caught.value.code == 1
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [["--repeats", "0"], ["--layers", "four"], ["--layers", "0"], ["--failed", "other"], ["--out", "no/such/file"],
     ["--plot", "no/such/file.png"], ["--nosuch"]],
)  # fmt: skip
def test_wrong_usage(given: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        MADE.run(given)
    assert caught.value.code == 2


def test_a_plot_has_a_panel_per_metric_and_a_bar_per_row(tmp_path: Path) -> None:
    plot = pytest.importorskip("benchmarks.common.plot")
    path = tmp_path / "plot.svg"
    assert MADE.run(["--plot", str(path)]) == 0
    assert path.read_text().count("<!-- cold_s, float32 -->") == 1
    rows = [{"system": "a", "metric": "m", "batch": 1}, {"system": "b", "metric": "m", "batch": 32}]
    assert plot.panels([*rows, {"system": "a", "metric": "other"}]) == {
        "m": rows,
        "other": [{"system": "a", "metric": "other"}],
    }
    assert [plot.label(row, rows) for row in rows] == ["a, batch 1", "b, batch 32"]
