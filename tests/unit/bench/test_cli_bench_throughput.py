"""`piecework bench throughput` with stand-ins for the processes that it runs."""

import html
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from piecework.bench import throughput
from piecework.bench.measurements import Measured
from piecework.bench.random_models import RANDOM_MODELS
from piecework.bench.systems.throughput import SCRIPT
from piecework.cli import bench_throughput
from piecework.cli.main import main
from piecework.engine.profile_options import ProfileOptions
from tests.unit.bench.stubs import write_stub
from tests.unit.models.tiny import write_config

OURS = {"out_tok_s": 500.0, "total_tok_s": 1500.0, "one_request_tok_s": 90.0, "notes": ["profile of 3 forwards"]}
PEERS = {"out_tok_s": 400.0, "total_tok_s": 1200.0, "one_request_tok_s": 80.0}
ANSWERS = {
    "compile": {"bundle": "/b"},
    "generate": {},
    "throughput": OURS,
    SCRIPT: PEERS,
    "vllm_compile.py": {"marks": {"first_token": 12.5}},
}
TINY = ["bench", "throughput", "--random-llama", "tiny", "--requests", "4", "--input", "16", "--output", "8"]


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Stand in for what else the machine does: the share that other processes take."""
    share = [0.0]
    monkeypatch.setattr(throughput, "share_of_others", lambda before, after: share[0])
    return share


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for the processes that are measured, vLLM's as well."""
    place = tmp_path / "stub"
    python = write_stub(place, ANSWERS)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr("tempfile.tempdir", str(place / "tmp"))
    installed = tmp_path / "peers" / "v" / "bin"
    installed.mkdir(parents=True)
    (installed / "python").symlink_to(python)
    for name in (SCRIPT, "vllm_compile.py"):
        (place / name).write_text("")
    monkeypatch.setenv("PEERS_ROOT", str(tmp_path / "peers"))
    return place


def calls(stub: Path) -> list[list[str]]:
    return [line.split() for line in (stub / "calls").read_text().splitlines()]


def names(stub: Path) -> list[str]:
    """Return which processes ran, those that only ask for a version left out."""
    found = []
    for words in calls(stub):
        if words[0] == "-m":
            found.append(words[2] if words[1] == "piecework" else words[1].rpartition(".")[2])
        elif words[0] != "-c":
            found.append(Path(words[0]).name)
    return found


def value_of(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_systems_take_turns_in_processes_of_their_own(
    stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main([*TINY, "--repeats", "2", "--peers", str(stub), "--json", "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == report
    first = ["throughput", SCRIPT, "generate", "vllm_compile.py"]
    second = [SCRIPT, "throughput", "vllm_compile.py", "generate"]  # so that none always follows the same one
    assert names(stub) == ["compile", "vllm_compile.py", *first, *second]
    rows = {(r["system"], r["metric"]): r for r in report["rows"]}
    assert rows["piecework", "output_tok_s"] == {
        "system": "piecework", "layers": 2, "metric": "output_tok_s", "dtype": "bfloat16", "batch": 4, "value": 500,
        "unit": "tokens/s", "n": 2, "min": 500, "max": 500, "note": "median of 3 runs in each of n processes",
    }  # fmt: skip
    assert {m for s, m in rows if s == "vllm"} == {"output_tok_s", "total_tok_s", "one_request_tok_s", "first_token_s"}
    assert rows["vllm", "first_token_s"]["value"] == 12.5
    assert (rows["piecework", "cold_s"]["n"], rows["piecework", "first_token_s"]["n"]) == (1, 2)
    assert rows["piecework", "one_request_tok_s"]["batch"] == 1
    assert [goal["goal"].partition(" ")[0] for goal in report["goals"]] == [
        "output_tok_s", "one_request_tok_s", "first_token_s",
    ]  # fmt: skip
    assert report["versions"]["vllm"] == "0.0.1"
    assert (report["settings"]["model"], report["settings"]["hidden"]) == ("llama-tiny", 64)
    assert report["notes"] == ["vllm runs without tcmalloc and iomp, which PEERS_ROOT doesn't have"]
    assert list((stub / "tmp").iterdir()) == []


def test_both_do_the_same_work(stub: Path) -> None:
    assert main([*TINY, "--repeats", "1", "--runs", "5", "--dtype", "float32", "--peers", str(stub)]) == 0
    by_name = dict(zip(names(stub), [c for c in calls(stub) if c[0] != "-c"], strict=True))
    ours, theirs = by_name["throughput"], by_name[SCRIPT]
    assert value_of(ours, "--bundle") == "/b"
    assert ours[2] == value_of(theirs, "--model")
    for mine, other, value in (
        ("--requests", "--requests", "4"),
        ("--input", "--inp", "16"),
        ("--output", "--out", "8"),
        ("--runs", "--reps", "5"),
    ):
        assert (value_of(ours, mine), value_of(theirs, other)) == (value, value)
    assert value_of(by_name["compile"], "--dtype") == value_of(theirs, "--dtype") == "float32"
    assert value_of(theirs, "--mode") == "default"


def test_the_model_lies_where_both_find_it_and_what_is_cached_beside_it(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("deb/x/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4", "v/lib/libiomp5.so"):
        (tmp_path / "peers" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "peers" / path).touch()
    assert main([*TINY, "--repeats", "1", "--peers", str(stub)]) == 0
    assert value_of(next(c for c in calls(stub) if c[0].endswith(SCRIPT)), "--preload") == "1"


def test_the_table(stub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--repeats", "1", "--peers", str(stub)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.split()[:3] == ["piecework", "2", "output_tok_s"]]
    assert line.endswith("output_tok_s ÷ vllm's = 1.25 (≥ 1: met; aim 1.2: met)")


def test_where_vllm_is_not_set_up_a_note_says_so(
    stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "--repeats", "1", "--peers", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["notes"] == [f"vllm is not measured: no {SCRIPT} in {tmp_path.name}"]
    assert {row["system"] for row in report["rows"]} == {"piecework"}


def test_without_the_script_for_it_vllms_first_token_is_left_out(
    stub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stub / "vllm_compile.py").unlink()
    assert main([*TINY, "--repeats", "1", "--peers", str(stub), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["system"] for row in rows if row["metric"] == "first_token_s"] == ["piecework"]


@pytest.mark.parametrize(("failing", "code"), [(SCRIPT, 0), ("throughput", 1), ("compile", 1)])
def test_what_fails_is_told_and_not_tried_again(
    stub: Path, failing: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (stub / f"{failing}.fail").touch()
    assert main([*TINY, "--repeats", "2", "--peers", str(stub), "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert sum("told to fail" in note for note in report["notes"]) == 1
    assert names(stub).count(failing) == 1
    assert report["goals"] == []
    other = "vllm" if code else "piecework"
    assert {"output_tok_s", "first_token_s"} <= {r["metric"] for r in report["rows"] if r["system"] == other}


def test_a_machine_that_is_busy_with_something_else_is_noted(
    stub: Path, others: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    others[0] = 0.25
    assert main([*TINY, "--repeats", "1", "--systems", "piecework", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes[1] == "throughput: piecework: other processes took 25% of the machine meanwhile, so don't trust it"
    assert len(notes) == 3


def test_a_plot(stub: Path, tmp_path: Path) -> None:
    path = tmp_path / "plot.html"
    assert main([*TINY, "--repeats", "1", "--peers", str(stub), "--plot", str(path)]) == 0
    assert "output_tok_s ÷ vllm's = 1.25" in html.unescape(path.read_text())


def test_a_plot_that_cant_be_is_told_before_anything_is_measured(
    stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "--plot", str(tmp_path / "plot.pdf"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "RequestError"
    assert not (stub / "calls").exists()


def test_a_profile_is_taken_apart_from_the_figures(
    stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--systems", "piecework", "--profile", str(tmp_path / "profile"), "--profile-steps", "3"]
    assert main([*TINY, "--repeats", "1", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == ["profile of 3 forwards"]
    *_, measured, _, profiled = calls(stub)
    assert "--profile" not in measured
    assert value_of(profiled, "--profile") == str(tmp_path / "profile")
    assert value_of(profiled, "--profile-steps") == "3"


def test_a_profile_that_fails_is_told(stub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stub / "throughput.fail").touch()
    assert main([*TINY, "--repeats", "1", "--systems", "piecework", "--profile", "p", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["notes"]) == 1  # not even tried


def test_a_directory_without_weights_gets_random_ones(stub: Path, tmp_path: Path) -> None:
    model = write_config(tmp_path / "model", "llama")
    assert main(["bench", "throughput", str(model), "--systems", "piecework", "--repeats", "1"]) == 0
    compile_, cell, generate = calls(stub)
    assert value_of(compile_, "--weights") == "none"
    assert value_of(cell, "--random-weights") == value_of(generate, "--random-weights") == "0"
    assert cell[2] == str(model)


def test_a_directory_that_is_no_model(stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", str(tmp_path), "--systems", "piecework", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "UnsupportedModelError"


@pytest.mark.parametrize(
    "options",
    [
        ["--random-llama", "9000b"],
        ["somewhere", "--random-llama", "tiny"],
        ["--requests", "0"],
        ["--systems", "other"],
        ["--dtype", "float64"],
        ["--repeats", "0"],
        ["--out", "no/such/directory/file"],
        ["--plot", "no/such/directory/file.html"],
    ],
)
def test_wrong_usage(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_throughput, "measure_throughput", lambda *a, **k: pytest.fail("it was measured"))
    with pytest.raises(SystemExit) as caught:
        main(["bench", "throughput", *options])
    assert caught.value.code == 2


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def measure(settings: Any, *, on_progress: Any) -> Measured:
        seen.append(settings)
        return Measured((), (), frozenset())

    monkeypatch.setattr(bench_throughput, "measure_throughput", measure)
    options = ["--backend", "eager", "--profile", "there", "--systems", "piecework"]
    assert main(["bench", "throughput", *options]) == 0
    (settings,) = seen
    assert settings.model is RANDOM_MODELS["llama-100m"]
    assert (settings.dtype, settings.requests, settings.input, settings.output) == ("bfloat16", 32, 128, 64)
    assert (settings.runs, settings.repeats, settings.backend) == (3, 3, "eager")
    assert settings.profile == ProfileOptions(Path("there"))
