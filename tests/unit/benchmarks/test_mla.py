"""`python -m benchmarks.mla` with stand-ins for the processes that it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.chats import ChatLoad, Outcome, figures_of
from benchmarks.common.models import TINY_LATENT
from benchmarks.common.run import Run
from benchmarks.common.vllm_peer import THROUGHPUT_SCRIPT
from benchmarks.mla import BENCHMARK, LITE, check_goals
from tests.unit.benchmarks.stubs import Stub, value_of

CHATS = "vllm_chats.py"
FIGURES = {"output_tok_s": 500.0, "total_tok_s": 1500.0, "one_request_tok_s": 90.0}
ANSWERS = {
    "compile": {"bundle": "/b"},
    "mla_layers": {"bundles": [[100.0 * form + i for i in range(6)] for form in (1, 2)]},
    "chats": figures_of([Outcome(0.0, (0.01, 0.02), 2)]),
    "bench": {"figures": {name: {"value": value} for name, value in FIGURES.items()}},
    CHATS: {"outcomes": [{"begin_s": 0.0, "token_s": [0.25, 0.5]}]},
    THROUGHPUT_SCRIPT: {"out_tok_s": 400.0, "total_tok_s": 1200.0, "one_request_tok_s": 80.0},
}
TINY = ["--layer-shape", "tiny", "--random-model", "mla-tiny", "--chat-requests", "1"]
ONCE = ["--repeats", "1", "--end-to-end-repeats", "1"]


@pytest.fixture
def stub(make_stub: Callable[[Any], Stub]) -> Stub:
    return make_stub(ANSWERS)


def measured(*given: str, out: Path, code: int = 0) -> dict[str, Any]:
    assert BENCHMARK.run([*TINY, *given, "--out", str(out)]) == code
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_forms_take_turns(stub: Stub, tmp_path: Path) -> None:
    options = ["--repeats", "2", "--end-to-end-repeats", "1", "--dtypes", "float32"]
    report = measured(*options, out=tmp_path / "out.json")
    both = ["compile", "compile"]
    assert stub.names() == [
        *both, "mla_layers", "mla_layers",
        *both, CHATS, "chats", "chats", CHATS,
        *both, "bench", "bench", THROUGHPUT_SCRIPT,
    ]  # fmt: skip
    compiled = [words for name, words in zip(stub.names(), stub.calls(), strict=True) if name == "compile"]
    assert [value_of(words, "--mla") for words in compiled] == ["exposed", "opaque"] * 3
    rows = report["rows"]
    assert rows[0] == {
        "system": "exposed", "layers": 2, "metric": "tok_s", "dtype": "float32", "regime": "decode", "batch": 1,
        "context": 512, "value": 150, "unit": "tokens/s", "n": 2, "min": 100, "max": 200,
        "note": "forwards of 1 decode tokens after 512 each; median of those of each process",
    }  # fmt: skip
    forwards = [row for row in rows if row["metric"] == "tok_s"]
    assert [row["system"] for row in forwards] == ["exposed"] * 6 + ["opaque"] * 6
    assert [(r["min"], r["max"]) for r in forwards] == [
        (100 + i, 200 + i) for i in range(6)
    ] * 2  # each loaded first once
    assert {row["regime"] for row in forwards} == {"decode", "prefill", "mixed"}
    assert {row["system"] for row in rows if row["metric"] == "output_tok_s"} == {"exposed", "opaque", "vllm"}
    assert {row["metric"] for row in rows if "ttft" in row["metric"]} == {
        "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms",
    }  # fmt: skip
    assert (report["settings"]["model"], report["settings"]["hidden"]) == ("mla-tiny", TINY_LATENT.hidden)
    assert report["versions"]["vllm"] == "0.0.1"
    assert list((stub.place / "tmp").iterdir()) == []


def test_all_do_the_same_work(stub: Stub, tmp_path: Path) -> None:
    options = ["--chat-input", "6", "--chat-output", "7", "--chat-max-length", "80", "--backend", "eager"]
    options += ["--requests", "4", "--input", "16", "--output", "8", "--runs", "2", "--dtypes", "bfloat16"]
    measured(*ONCE, *options, out=tmp_path / "out.json")
    called = list(zip(stub.names(), stub.calls(), strict=True))
    for name in ("chats", "bench"):
        exposed, opaque = (words for found, words in called if found == name)
        assert [word for word in exposed if word != "exposed"] == [word for word in opaque if word != "opaque"]
    compiled = [words for name, words in called if name == "compile"]
    assert {value_of(words, "--backend") for words in compiled} == {"eager"}
    assert [value_of(words, "--weights") for words in compiled] == ["none"] * 2 + ["real"] * 4
    chats, theirs = (next(words for name, words in called if name == wanted) for wanted in ("chats", CHATS))
    sent = {name: value_of(chats, f"--chat-{name}") for name in ("requests", "input", "output", "max-length")}
    assert sent == {"requests": "1", "input": "6", "output": "7", "max-length": "80"}
    assert value_of(theirs, "--model") == chats[2]
    assert value_of(theirs, "--max-length") == "80"
    offline, script = (next(w for name, w in called if name == wanted) for wanted in ("bench", THROUGHPUT_SCRIPT))
    for mine, other, value in (
        ("--requests", "--requests", "4"),
        ("--input", "--inp", "16"),
        ("--output", "--out", "8"),
    ):
        assert (value_of(offline, mine), value_of(script, other)) == (value, value)


def test_vllm_gets_the_same_chats(stub: Stub, tmp_path: Path) -> None:
    report = measured(*ONCE, "--parts", "serving", out=tmp_path / "out.json")
    found = {row["metric"]: row for row in report["rows"] if row["system"] == "vllm"}
    assert (found["mean_ttft_ms"]["value"], found["median_itl_ms"]["value"]) == (250, 250)
    ((prompt, output),) = ChatLoad(1).draw(vocab=1024)
    assert found["mean_ttft_ms"]["note"] == f"{len(prompt)} tokens of prompts, {output} generated"
    assert "output_throughput ÷ vllm's" in [goal["goal"] for goal in report["goals"]]


@pytest.mark.parametrize(
    ("failing", "code"), [("mla_layers", 1), ("chats", 1), ("compile", 1), (THROUGHPUT_SCRIPT, 0), (CHATS, 0)]
)
def test_what_fails_is_told_and_the_rest_is_measured(stub: Stub, tmp_path: Path, failing: str, code: int) -> None:
    stub.fail(failing)
    report = measured("--repeats", "2", "--dtypes", "float32", out=tmp_path / "out.json", code=code)
    assert any("told to fail" in note for note in report["notes"])
    metrics = {row["metric"] for row in report["rows"] if row["system"] != "vllm"}
    assert ("tok_s" in metrics) == (failing not in ("mla_layers", "compile"))
    assert ("mean_ttft_ms" in metrics) == (failing not in ("chats", "compile"))
    assert "output_tok_s" in {row["metric"] for row in report["rows"]}


def test_the_layers_are_those_of_v2_lite() -> None:
    assert (LITE.hidden, LITE.heads, LITE.kv_rank, LITE.rope, LITE.nope, LITE.value) == (2048, 16, 512, 64, 128, 128)


@pytest.mark.parametrize(
    ("metric", "regime", "exposed", "text"),
    [
        ("tok_s", "decode", 1.05, "tok_s ÷ opaque's = 1.05 (≥ 1.05: met)"),
        ("tok_s", "decode", 1.04, "tok_s ÷ opaque's = 1.04 (≥ 1.05: MISSED)"),
        ("tok_s", "mixed", 1.0, "tok_s ÷ opaque's = 1 (≥ 1: met)"),
        ("tok_s", "prefill", 0.99, "tok_s ÷ opaque's = 0.99 (≥ 1: MISSED)"),
        ("output_throughput", None, 0.5, "output_throughput ÷ opaque's = 0.5 (≥ 1: MISSED)"),
        ("median_ttft_ms", None, 1.01, "median_ttft_ms ÷ opaque's = 1.01 (≤ 1: MISSED)"),
        ("mean_ttft_ms", None, 0.9, "mean_ttft_ms ÷ opaque's = 0.9 (≤ 1: met)"),
    ],
)
def test_goals_beside_the_opaque_form(
    tmp_path: Path, metric: str, regime: str | None, exposed: float, text: str
) -> None:
    run = Run(tmp_path)
    run.add(exposed, system="exposed", metric=metric, regime=regime)
    run.add(5.0, system="opaque", metric=metric, regime="another")  # not the same regime
    check_goals(run)
    assert run.goals == []
    run.add(1.0, system="opaque", metric=metric, regime=regime)
    check_goals(run)
    assert [str(goal) for goal in run.goals] == [text]
