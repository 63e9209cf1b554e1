"""`python -m benchmarks.real_shapes` with stand-ins for the compiles, and the memory of a tree of real processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cells.process_tree import measure
from benchmarks.real_shapes import BENCHMARK
from tests.unit.benchmarks.stubs import Stub, value_of
from tests.unit.models.tiny import write_config

FOUND = {"wall_s": 61.5, "peak_mb": 900.0, "bundle_bytes": 1 << 20, "capture_s": 2.0, "pieces": 9, "unique_pieces": 3}


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    root = tmp_path / "configs"
    write_config(root / "llama-3.3-70b", "llama")
    (root / "other").mkdir()
    (root / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return root


def test_what_is_taken_is_compiled_cold(configs: Path, make_stub: Callable[[Any], Stub], tmp_path: Path) -> None:
    stub = make_stub({"process_tree": FOUND})
    out = tmp_path / "out.json"
    assert BENCHMARK.run(["--configs", str(configs), "--repeats", "2", "--out", str(out)]) == 0
    assert stub.names() == ["process_tree"] * 2
    for words in stub.calls():
        assert Path(value_of(words, "compile")).name == "llama-3.3-70b"
        assert value_of(words, "--weights") == "none"
        assert value_of(words, "--dtype") == "bfloat16"
    report = json.loads(out.read_text())
    found = {(row["system"], row["metric"]): row["value"] for row in report["rows"]}
    assert found["piecework", "cold_s"] == 61.5
    assert found["vllm", "cold_s"] == 62.9
    assert {goal["goal"]: goal["met"] for goal in report["goals"]} == {"cold_s": False, "peak_mb": True}
    assert any("other is not measured" in note for note in report["notes"])


def test_a_tree_of_processes() -> None:
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("no /proc")
    child = "import time; held = bytearray(b'x' * (40 << 20)); time.sleep(0.5)"
    lines = (
        f"import json, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print(json.dumps(dict(n=1)))"
    )
    found = measure([sys.executable, "-c", lines])
    assert found["n"] == 1
    assert found["wall_s"] > 0.5
    assert 40 < found["peak_mb"] < 200
