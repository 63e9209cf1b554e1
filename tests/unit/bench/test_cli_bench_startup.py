"""`piecework bench startup` with stand-ins for the processes that it runs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from piecework.bench.launch import Launcher
from piecework.bench.measurements import Key, Measured, Row
from piecework.bench.systems.vllm import Peers, find_peers
from piecework.cli import bench_options, bench_startup
from piecework.cli.main import main
from tests.unit.bench.stubs import write_stub

STEPS = {"step_ms": 2.5, "step_min_ms": 2.0, "steps": 50}
COMPILED = {
    "capture_s": 1.0,
    "compile_s": 2.0,
    "pieces": 5,
    "unique_pieces": 3,
    "bundle_bytes": 1 << 20,
    "bundle": "/b",
}
VLLM = {
    "compilation_time_s": 9.0,
    "marks": {"first_token": 12.5},
    "counters": {"num_piecewise_capturable_graphs_seen": 5, "num_compiled_artifacts_saved": 3},
    "cache_mb": 2.5,
}
ANSWERS = {
    "compile": COMPILED,
    "generate": {},
    "load": {"load_ms": 5.0, "load_pack_ms": 7.0, "load_weights_ms": 1.0, "rss_mb": 24.0, **STEPS},
    "torch_compile": {"first_step_s": 20.0, **STEPS},
    "torch_regional": {"first_step_s": 15.0, **STEPS},
    "eager": {"first_token_s": 4.0, **STEPS},
    "vllm_compile.py": VLLM,
}
SMALL = [
    "bench",
    "startup",
    "--layers",
    "1,2",
    "--hidden",
    "32",
    "--heads",
    "2",
    "--intermediate",
    "48",
    "--vocab",
    "300",
]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for the processes that are measured."""
    place = tmp_path / "stub"
    python = write_stub(place, ANSWERS)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr("tempfile.tempdir", str(place / "tmp"))
    return place


def rows(printed: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(printed)["rows"]
    return found


def test_all_systems(
    stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "peers" / "v" / "bin"
    installed.mkdir(parents=True)
    (installed / "python").symlink_to(stub / "python")
    (stub / "vllm_compile.py").write_text("")
    monkeypatch.setenv("PEERS_ROOT", str(tmp_path / "peers"))
    out = tmp_path / "out.json"
    assert main([*SMALL, "--repeats", "2", "--peers", str(stub), "--json", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert json.loads(out.read_text()) == json.loads(printed)
    report = json.loads(printed)
    assert {"machine", "versions", "commit", "rows", "goals", "notes", "settings"} <= report.keys()
    assert report["versions"]["vllm"] == "0.0.1"
    assert report["notes"] == []
    metrics: dict[str, set[str]] = {}
    for row in report["rows"]:
        assert {"system", "layers", "metric", "value", "unit", "n", "min", "max"} <= row.keys()
        assert row["layers"] in (1, 2)
        assert ("batch" in row) == (row["metric"] == "step_ms")
        metrics.setdefault(row["system"], set()).add(row["metric"])
    ours = "capture_s cold_s load_ms first_token_s import_torch_s step_ms pieces unique_pieces bundle_mb rss_mb"
    assert set(ours.split()) <= metrics["piecework"]
    assert metrics["torch_compile"] == metrics["torch_regional"] == {"cold_s", "step_ms", "first_token_s"}
    assert metrics["eager"] == {"first_token_s", "step_ms"}
    assert {"cold_s", "load_ms", "first_token_s"} <= metrics["vllm"]
    assert {(r["dtype"], r["batch"]) for r in report["rows"] if r["metric"] == "step_ms"} == {
        (dtype, batch) for dtype in ("float32", "bfloat16") for batch in (1, 32)
    }
    assert list((stub / "tmp").iterdir()) == []


def test_the_number_of_samples_is_stated(stub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dtypes", "float32", "--batches", "1", "--systems", "piecework,torch_compile", "--repeats", "3"]
    assert main([*SMALL, *options, "--peer-repeats", "2", "--json"]) == 0
    n = {(r["system"], r["metric"]): r["n"] for r in rows(capsys.readouterr().out)}
    assert n["piecework", "cold_s"] == n["piecework", "step_ms"] == n["torch_compile", "step_ms"] == 3
    assert n["torch_compile", "cold_s"] == 2


def test_the_bundle_of_the_same_model_is_loaded(stub: Path) -> None:
    assert main([*SMALL, "--systems", "piecework", "--repeats", "1", "--dtypes", "float32", "--batches", "1"]) == 0
    calls = [line.split() for line in (stub / "calls").read_text().splitlines()]
    verbs = [
        words[2] if words[1] == "piecework" else words[1].rpartition(".")[2] for words in calls if words[0] == "-m"
    ]
    # the warm-up, a round's cold starts, warm ones, steps
    assert verbs == ["compile", "compile", "compile", "generate", "load", "generate", "load", "load", "load"]
    assert "llama-1-float32" in " ".join(calls[0])
    assert all(words[words.index("--bundle") + 1] == "/b" for words in calls if "--bundle" in words)


def test_where_vllm_is_not_set_up_a_note_says_so(
    stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--systems", "eager,vllm", "--repeats", "1", "--dtypes", "float32", "--batches", "1", "--json"]
    assert main([*SMALL, *options, "--peers", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    (note,) = json.loads(captured.out)["notes"]
    assert note.startswith("vllm is not measured: no vllm_compile.py")
    assert note in captured.err
    assert {row["system"] for row in rows(captured.out)} == {"eager"}


@pytest.mark.parametrize(("failing", "code"), [("torch_regional", 0), ("compile", 1)])
def test_a_failure_is_told(stub: Path, failing: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    (stub / f"{failing}.fail").touch()
    options = ["--systems", "piecework,torch_regional", "--repeats", "2", "--dtypes", "float32", "--batches", "1"]
    assert main([*SMALL, *options, "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert any("told to fail" in note for note in report["notes"])
    assert {row["system"] for row in report["rows"]} == {"piecework", "torch_regional"} - {
        {"compile": "piecework"}.get(failing, failing)
    }


def test_the_table(stub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--systems", "piecework,torch_compile", "--repeats", "1", "--dtypes", "float32", "--batches", "1"]
    assert main([*SMALL, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("machine: cpu ")
    assert lines[1].startswith("versions: python ")
    (load,) = [line for line in lines if line.split()[:3] == ["piecework", "2", "load_ms"]]
    assert load.split()[3:] == ["float32", "5", "ms", "1", "5", "5", *["load_ms", "=", "5", "(≤", "60:", "met)"]]
    assert any(line.endswith("step_ms ÷ torch_compile's = 1 (≤ 1: met)") for line in lines)


def test_a_row_without_dtype_has_empty_cells() -> None:
    text = bench_options.table((Row(Key("vllm", 4, "pieces"), 5.0, n=1, min=5.0, max=5.0),), ())
    assert text.splitlines()[-1].split() == ["vllm", "4", "pieces", "5", "1", "5", "5"]


@pytest.mark.parametrize(
    "options",
    [
        ["--layers", "0"],
        ["--layers", "four"],
        ["--dtypes", "float64"],
        ["--systems", "piecework,other"],
        ["--repeats", "0"],
        ["--batches", "1,300"],
        ["--out", "no/such/directory/file"],
        ["--nosuch"],
    ],
)
def test_wrong_usage(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_startup, "measure_startup", lambda *args, **kwargs: pytest.fail("it was measured"))
    with pytest.raises(SystemExit) as caught:
        main(["bench", "startup", *options])
    assert caught.value.code == 2


def test_a_benchmark_must_be_named() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench"])
    assert caught.value.code == 2


def test_a_shape_that_no_model_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "startup", "--vocab", "100", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "RequestError"


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def measure(settings: Any, *, on_progress: Any) -> Measured:
        seen.append(settings)
        return Measured((), (), frozenset())

    monkeypatch.setattr(bench_startup, "measure_startup", measure)
    options = ["--layers", "80,4,4", "--repeats", "2", "--peer-repeats", "5", "--systems", "eager", "--debug"]
    assert main(["bench", "startup", *options]) == 0
    assert seen[0].layers == (4, 80)
    assert seen[0].peer_repeats == 2
    assert seen[0].systems == ("eager",)
    assert seen[0].dtypes == ("float32", "bfloat16")


def test_finding_peers(stub: Path, tmp_path: Path) -> None:
    assert find_peers(tmp_path, scripts=tmp_path / "none") == "no vllm_compile.py in none"
    (stub / "vllm_compile.py").write_text("")
    assert str(find_peers(tmp_path, scripts=stub)).startswith("not installed")
    installed = tmp_path / "v" / "bin"
    installed.mkdir(parents=True)
    (installed / "python").symlink_to(stub / "python")
    found = find_peers(tmp_path, scripts=stub)
    assert isinstance(found, Peers)
    assert (found.version, found.script) == ("0.0.1", stub / "vllm_compile.py")
    (stub / "-c.fail").touch()
    assert str(find_peers(tmp_path, scripts=stub)).startswith("PEERS_ROOT has no vllm")


def test_cold_means_a_fresh_cache_each_round(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []
    original = Launcher.caches

    def caches(self: Launcher, name: str, *, fresh: bool) -> Any:
        asked.append((name, fresh))
        return original(self, name, fresh=fresh)

    monkeypatch.setattr(Launcher, "caches", caches)
    options = ["--systems", "torch_compile", "--repeats", "2", "--peer-repeats", "2", "--dtypes", "float32"]
    assert main([*SMALL, *options, "--layers", "1"]) == 0
    name = "torch_compile/1-float32"
    round_ = [(f"{name}-1", True), (f"{name}-1", False), (f"{name}-32", False)]
    assert asked == round_ * 2
