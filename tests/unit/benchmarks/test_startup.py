"""`python -m benchmarks.startup` with stand-ins for the processes that it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.startup import BENCHMARK
from tests.unit.benchmarks.stubs import Stub, value_of

STEPS = {"step_ms": 2.5, "step_min_ms": 2.0, "steps": 50}
ANSWERS = {
    "compile": {
        "capture_s": 1.0, "compile_s": 2.0, "pieces": 5, "unique_pieces": 3, "bundle_bytes": 1 << 20, "bundle": "/b",
    },
    "generate": {},
    "load": {"load_ms": 5.0, "load_pack_ms": 7.0, "load_weights_ms": 1.0, "rss_mb": 24.0, **STEPS},
    "torch_module": {"first_s": 20.0, **STEPS},
    "vllm_compile.py": {
        "compilation_time_s": 9.0,
        "marks": {"first_token": 12.5},
        "counters": {"num_piecewise_capturable_graphs_seen": 5, "num_compiled_artifacts_saved": 3},
        "cache_mb": 2.5,
    },
}  # fmt: skip
SMALL = ["--layers", "1,2", "--hidden", "32", "--heads", "2", "--intermediate", "48", "--vocab", "300"]
ONE = ["--dtypes", "float32", "--batches", "1"]


@pytest.fixture
def stub(make_stub: Callable[[Any], Stub]) -> Stub:
    return make_stub(ANSWERS)


@pytest.fixture
def measured(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(*given: str, code: int = 0) -> dict[str, Any]:
        out = tmp_path / "out.json"
        assert BENCHMARK.run([*SMALL, *given, "--out", str(out)]) == code
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return run


def test_all_systems(stub: Stub, measured: Callable[..., dict[str, Any]]) -> None:
    report = measured("--repeats", "1", "--layers", "1")
    assert {"machine", "versions", "commit", "rows", "goals", "notes", "settings"} <= report.keys()
    assert report["versions"]["vllm"] == "0.0.1"
    assert report["notes"] == ["vllm runs without tcmalloc and iomp, which --peers doesn't have"]
    metrics: dict[str, set[str]] = {}
    for row in report["rows"]:
        assert {"system", "layers", "metric", "dtype", "value", "unit", "n", "min", "max"} <= row.keys()
        assert ("batch" in row) == (row["metric"] == "step_ms")
        metrics.setdefault(row["system"], set()).add(row["metric"])
    ours = "capture_s cold_s load_ms first_token_s import_torch_s step_ms pieces unique_pieces bundle_mb rss_mb"
    assert set(ours.split()) <= metrics["piecework"]
    assert metrics["torch_compile"] == metrics["torch_regional"] == {"cold_s", "step_ms", "first_token_s"}
    assert metrics["eager"] == {"first_token_s", "step_ms"}
    assert {"cold_s", "load_ms", "first_token_s"} <= metrics["vllm"]
    assert {row["dtype"] for row in report["rows"] if row["system"] == "vllm"} == {"bfloat16"}
    assert {(r["dtype"], r["batch"]) for r in report["rows"] if r["metric"] == "step_ms"} == {
        (dtype, batch) for dtype in ("float32", "bfloat16") for batch in (1, 32)
    }
    assert list((stub.place / "tmp").iterdir()) == []


def test_systems_take_turns_and_phases_follow_each_other(stub: Stub, measured: Callable[..., dict[str, Any]]) -> None:
    measured("--systems", "piecework,torch_compile", "--repeats", "2", "--layers", "1", *ONE)
    warm_up = ["compile"]
    first = ["compile", "torch_module", "generate", "load", "load", "torch_module"]
    second = ["compile", "generate", "load", "load", "torch_module"]  # peers compile cold in one round only
    assert stub.names() == [*warm_up, *first, *second]
    bundles = [value_of(words, "--bundle") for words in stub.calls() if "--bundle" in words]
    assert set(bundles) == {"/b"}


def test_the_number_of_samples_is_stated(stub: Stub, measured: Callable[..., dict[str, Any]]) -> None:
    options = ["--systems", "piecework,torch_compile", "--repeats", "3", "--peer-repeats", "2", "--layers", "1", *ONE]
    n = {(row["system"], row["metric"]): row["n"] for row in measured(*options)["rows"]}
    assert n["piecework", "cold_s"] == n["piecework", "step_ms"] == n["torch_compile", "step_ms"] == 3
    assert n["torch_compile", "cold_s"] == 2


def test_goals(stub: Stub, measured: Callable[..., dict[str, Any]]) -> None:
    goals = measured("--systems", "piecework,torch_compile", "--repeats", "1", *ONE)["goals"]
    found = {(goal["goal"], goal["layers"]): goal for goal in goals}
    assert found["step_ms ÷ torch_compile's", 1]["met"]
    assert found["load_ms", 2]["value"] == 5.0
    assert found["unique_pieces ÷ that at 1 layers", 2]["value"] == 1.0
    assert ("load_ms", 1) not in found  # those about many layers are held at the most
    assert {"cold_s ÷ torch_compile's", "first_token_s − import_torch_s", "rss_mb"} <= {text for text, _ in found}


@pytest.mark.parametrize("name", ["PEERS_ROOT", "PEERS_SCRIPTS"])
def test_where_vllm_is_not_set_up_a_note_says_so(
    stub: Stub, measured: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv(name)
    report = measured("--systems", "eager,vllm", "--repeats", "1", *ONE)
    (note,) = report["notes"]
    assert note.startswith("vllm is not measured: ")
    assert {row["system"] for row in report["rows"]} == {"eager"}


@pytest.mark.parametrize(("failing", "code"), [("torch_module", 1), ("compile", 1), ("vllm_compile.py", 0)])
def test_a_failure_is_told_and_the_rest_measured(
    stub: Stub, measured: Callable[..., dict[str, Any]], failing: str, code: int
) -> None:
    stub.fail(failing)
    report = measured("--systems", "piecework,torch_regional,vllm", "--repeats", "1", *ONE, code=code)
    assert any("told to fail" in note for note in report["notes"])
    whose = {"compile": "piecework", "torch_module": "torch_regional", "vllm_compile.py": "vllm"}
    systems = {"piecework", "torch_regional", "vllm"} - {whose[failing]}
    assert {row["system"] for row in report["rows"]} == systems


def test_a_shape_that_no_model_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        BENCHMARK.run(["--vocab", "100"])
    assert caught.value.code == 1
    assert "RequestError" in capsys.readouterr().err
