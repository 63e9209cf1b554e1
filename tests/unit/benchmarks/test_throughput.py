"""`python -m benchmarks.throughput` with stand-ins for the processes that it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.vllm_peer import STARTUP_SCRIPT, THROUGHPUT_SCRIPT
from benchmarks.throughput import BENCHMARK
from tests.unit.benchmarks.stubs import Stub, value_of
from tests.unit.models.tiny import write_config

FIGURES = {"output_tok_s": 500.0, "total_tok_s": 1500.0, "one_request_tok_s": 90.0}
ANSWERS = {
    "compile": {"bundle": "/b"},
    "generate": {},
    "bench": {"figures": {name: {"value": value} for name, value in FIGURES.items()}},
    THROUGHPUT_SCRIPT: {"out_tok_s": 400.0, "total_tok_s": 1200.0, "one_request_tok_s": 80.0},
    STARTUP_SCRIPT: {"marks": {"first_token": 12.5}},
}
TINY = ["llama-tiny", "--requests", "4", "--input", "16", "--output", "8"]


@pytest.fixture
def stub(make_stub: Callable[[Any], Stub]) -> Stub:
    return make_stub(ANSWERS)


def measured(*given: str, out: Path, code: int = 0) -> dict[str, Any]:
    assert BENCHMARK.run([*given, "--out", str(out)]) == code
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_systems_take_turns_in_processes_of_their_own(stub: Stub, tmp_path: Path) -> None:
    report = measured(*TINY, "--repeats", "2", out=tmp_path / "out.json")
    first = ["bench", THROUGHPUT_SCRIPT, "generate", STARTUP_SCRIPT]
    second = [THROUGHPUT_SCRIPT, "bench", STARTUP_SCRIPT, "generate"]  # so that none always follows the same one
    assert stub.names() == ["compile", STARTUP_SCRIPT, *first, *second]
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
    assert (report["settings"]["model"], report["settings"]["hidden"]) == ("llama-tiny", 64)


def test_both_do_the_same_work(stub: Stub, tmp_path: Path) -> None:
    measured(*TINY, "--repeats", "1", "--runs", "5", "--dtype", "float32", out=tmp_path / "out.json")
    by_name = dict(zip(stub.names(), stub.calls(), strict=True))
    ours, theirs = by_name["bench"], by_name[THROUGHPUT_SCRIPT]
    assert ours[3] == value_of(theirs, "--model")
    for mine, other, value in (
        ("--requests", "--requests", "4"),
        ("--input", "--inp", "16"),
        ("--output", "--out", "8"),
        ("--runs", "--reps", "5"),
    ):
        assert (value_of(ours, mine), value_of(theirs, other)) == (value, value)
    for words in (by_name["compile"], ours, theirs):
        assert value_of(words, "--dtype") == "float32"
    assert value_of(theirs, "--preload") == "0"


def test_libraries_that_vllm_wants_are_preloaded_where_they_are(stub: Stub, tmp_path: Path) -> None:
    for path in ("deb/x/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4", "v/lib/libiomp5.so"):
        (tmp_path / "peers" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "peers" / path).touch()
    assert measured(*TINY, "--repeats", "1", out=tmp_path / "out.json")["notes"] == []
    assert value_of(stub.calls()[stub.names().index(THROUGHPUT_SCRIPT)], "--preload") == "1"


def test_without_the_script_for_it_vllms_first_token_is_left_out(stub: Stub, tmp_path: Path) -> None:
    (stub.place / STARTUP_SCRIPT).unlink()
    rows = measured(*TINY, "--repeats", "1", out=tmp_path / "out.json")["rows"]
    assert [row["system"] for row in rows if row["metric"] == "first_token_s"] == ["piecework"]


@pytest.mark.parametrize(("failing", "code"), [(THROUGHPUT_SCRIPT, 0), ("bench", 1), ("compile", 1)])
def test_what_fails_is_told_and_not_tried_again(stub: Stub, tmp_path: Path, failing: str, code: int) -> None:
    stub.fail(failing)
    report = measured(*TINY, "--repeats", "2", out=tmp_path / "out.json", code=code)
    assert sum("told to fail" in note for note in report["notes"]) == 1
    assert stub.names().count(failing) == 1
    other = "vllm" if code else "piecework"
    assert {"output_tok_s", "first_token_s"} <= {r["metric"] for r in report["rows"] if r["system"] == other}


def test_a_directory_without_weights_gets_random_ones(stub: Stub, tmp_path: Path) -> None:
    model = write_config(tmp_path / "model", "llama")
    measured(str(model), "--systems", "piecework", "--repeats", "1", out=tmp_path / "out.json")
    compile_, bench, generate = stub.calls()
    assert value_of(compile_, "--weights") == "none"
    assert value_of(bench, "--random-weights") == value_of(generate, "--random-weights") == "0"
    assert bench[3] == str(model)


def test_a_directory_that_is_no_model(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        BENCHMARK.run([str(tmp_path), "--systems", "piecework"])
    assert caught.value.code == 1
    assert "UnsupportedModelError" in capsys.readouterr().err
