"""`piecework bench mla` with stand-ins for the processes that it runs."""

import html
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from piecework.bench import throughput
from piecework.bench.goals import check_mla_goals
from piecework.bench.measurements import Key, Measured, Row
from piecework.bench.mla import LITE, MlaSettings, lite_batches
from piecework.bench.random_models import RANDOM_MODELS, TINY_LATENT
from piecework.bench.systems.mla import SERVING_METRICS, VLLM_CELL, ChatLoad
from piecework.bench.systems.throughput import SCRIPT
from piecework.cli import bench_mla
from piecework.cli.main import main
from tests.unit.bench.stubs import write_stub

OFFLINE = {"out_tok_s": 500.0, "total_tok_s": 1500.0, "one_request_tok_s": 90.0, "notes": []}
SERVING = {
    **dict.fromkeys(SERVING_METRICS, 10.0),
    "mean_tpot_ms": None,
    "total_input_tokens": 30,
    "total_output_tokens": 20,
}
ANSWERS = {
    "compile": {"bundle": "/b"},
    "mla_layers": {"bundles": [[{"tok_s": 100.0 * form + i} for i in range(6)] for form in (1, 2)]},
    "mla_serving": SERVING,
    "throughput": OFFLINE,
    VLLM_CELL.name: {"outcomes": [{"begin_s": 0.0, "token_s": [0.25, 0.5]}]},
    SCRIPT: {"out_tok_s": 400.0, "total_tok_s": 1200.0, "one_request_tok_s": 80.0},
}
TINY = ["bench", "mla", "--layer-shape", "tiny", "--random-model", "mla-tiny", "--chats", "1"]
ONCE = ["--repeats", "1", "--end-to-end-repeats", "1"]


@pytest.fixture(autouse=True)
def _idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "share_of_others", lambda before, after: 0.0)


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
    (place / SCRIPT).write_text("")
    (place / "vllm_compile.py").write_text("")
    monkeypatch.setenv("PEERS_ROOT", str(tmp_path / "peers"))
    return place


def calls(stub: Path) -> list[list[str]]:
    found = [line.split() for line in (stub / "calls").read_text().splitlines()]
    return [words for words in found if words[0] != "-c"]


def names(stub: Path) -> list[str]:
    """Return which processes ran; of those that compile, for which form."""
    found = []
    for words in calls(stub):
        if words[0] != "-m":
            found.append(Path(words[0]).name)
        else:
            found.append(value_of(words, "--mla") if words[1] == "piecework" else words[1].rpartition(".")[2])
    return found


def value_of(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_forms_take_turns(stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    options = ["--repeats", "2", "--end-to-end-repeats", "1", "--dtypes", "float32", "--peers", str(stub)]
    assert main([*TINY, *options, "--json", "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == report
    forms = ["exposed", "opaque"]
    assert names(stub) == [
        *forms, *["mla_layers"] * 2,
        *forms, VLLM_CELL.name, *["mla_serving"] * 2, VLLM_CELL.name,
        *forms, *["throughput"] * 2, SCRIPT,
    ]  # fmt: skip
    rows = report["rows"]
    assert rows[0] == {
        "system": "exposed", "layers": 2, "metric": "tok_s", "dtype": "float32", "regime": "decode", "batch": 1,
        "context": 512, "value": 150, "unit": "tokens/s", "n": 2, "min": 100, "max": 200,
        "note": "forwards of 1 decode tokens after 512 each; median of those of each process",
    }  # fmt: skip
    forwards = [row for row in rows if row["metric"] == "tok_s"]
    assert [row["system"] for row in forwards] == ["exposed"] * 6 + ["opaque"] * 6
    assert [(row["min"], row["max"]) for row in forwards] == [
        (100 + i, 200 + i) for i in range(6)
    ] * 2  # loaded first, once
    assert {row["regime"] for row in rows if row["metric"] == "tok_s"} == {"decode", "prefill", "mixed"}
    assert {row["system"] for row in rows if row["metric"] == "output_tok_s"} == {"exposed", "opaque", "vllm"}
    assert {row["metric"] for row in rows if "ttft" in row["metric"]} == {
        "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms",
    }  # fmt: skip
    assert "mean_tpot_ms" not in {row["metric"] for row in rows if row["system"] != "vllm"}  # which has no figure
    assert report["settings"]["model"] == "mla-tiny"
    assert report["settings"]["hidden"] == TINY_LATENT.hidden
    assert report["versions"]["vllm"] == "0.0.1"
    assert list((stub / "tmp").iterdir()) == []


def test_both_forms_do_the_same_work(stub: Path) -> None:
    options = ["--chats", "5", "--chat-input", "6", "--chat-output", "7", "--max-length", "80", "--backend", "eager"]
    options += ["--requests", "4", "--input", "16", "--output", "8", "--runs", "2", "--dtypes", "bfloat16"]
    assert main([*TINY, *ONCE, *options, "--systems", "exposed,opaque"]) == 0
    found = calls(stub)
    (layers,) = (words for words in found if words[1].endswith("cells.mla_layers"))
    assert layers[3:5] == ["/b", "/b"]
    for name in ("mla_serving", "throughput"):
        exposed, opaque = (words for words in found if words[1].endswith(f"cells.{name}"))
        assert exposed == opaque
    compiled = [words for words in found if "--mla" in words]
    assert {value_of(words, "--backend") for words in compiled} == {"eager"}
    assert [value_of(words, "--weights") for words in compiled] == ["none"] * 2 + ["real"] * 4
    chats = next(words for words in found if words[1].endswith("mla_serving"))
    for option, value in (("--requests", "5"), ("--input", "6"), ("--output", "7"), ("--max-length", "80")):
        assert value_of(chats, option) == value
    offline = next(words for words in found if words[1].endswith("cells.throughput"))
    for option, value in (("--requests", "4"), ("--input", "16"), ("--output", "8"), ("--runs", "2")):
        assert value_of(offline, option) == value
    batches = next(line for line in (stub / "calls").read_text().splitlines() if "mla_layers" in line)
    sent = json.loads(batches.partition("--batches ")[2].partition(" --steps")[0])
    assert [batch["decode"] for batch in sent] == [1, 8, 32, 0, 0, 16]


def test_vllm_does_it_too_offline(stub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *ONCE, "--parts", "offline", "--peers", str(stub), "--json"]) == 0
    ours, _, theirs = calls(stub)[-3:]
    assert value_of(theirs, "--model") == ours[2]
    assert (value_of(theirs, "--requests"), value_of(theirs, "--inp"), value_of(theirs, "--out")) == ("32", "128", "64")
    goals = [goal["goal"] for goal in json.loads(capsys.readouterr().out)["goals"]]
    assert goals == ["output_tok_s ÷ opaque's", "output_tok_s ÷ vllm's"]


def test_vllm_gets_the_same_chats(stub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *ONCE, "--parts", "serving", "--peers", str(stub), "--json"]) == 0
    assert names(stub) == ["exposed", "opaque", VLLM_CELL.name, "mla_serving", "mla_serving", VLLM_CELL.name]
    ours, theirs = calls(stub)[-2:]
    assert value_of(theirs, "--model") == ours[2]
    assert value_of(theirs, "--max-length") == value_of(ours, "--max-length")
    report = json.loads(capsys.readouterr().out)
    found = {row["metric"]: row["value"] for row in report["rows"] if row["system"] == "vllm"}
    assert (found["mean_ttft_ms"], found["median_itl_ms"]) == (250, 250)
    assert "output_throughput ÷ vllm's" in [goal["goal"] for goal in report["goals"]]


def test_where_vllm_is_not_set_up_a_note_says_so(
    stub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, *ONCE, "--parts", "offline", "--peers", str(tmp_path), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes == [f"vllm is not measured: no {SCRIPT} in {tmp_path.name}"]


def test_the_table_has_a_column_per_system(stub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *ONCE, "--parts", "offline", "--peers", str(stub)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["figure", "dtype", "unit", "exposed", "opaque", "vllm", "goal"] in lines
    (line,) = [words for words in lines if words[:1] == ["output_tok_s:"]]
    assert line[3:8] == ["bfloat16", "tokens/s", "500.00", "500.00", "400.00"]
    assert " ".join(line).endswith("output_tok_s ÷ vllm's = 1.25 (≥ 1: met; aim 1.2: met)")


@pytest.mark.parametrize(("failing", "code"), [("mla_layers", 1), ("mla_serving", 1), ("compile", 1), (SCRIPT, 0)])
def test_what_fails_is_told_and_the_rest_is_measured(
    stub: Path, failing: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (stub / f"{failing}.fail").touch()
    assert main([*TINY, "--repeats", "2", "--peers", str(stub), "--dtypes", "float32", "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert any("told to fail" in note for note in report["notes"])
    metrics = {row["metric"] for row in report["rows"] if row["system"] != "vllm"}
    assert ("tok_s" in metrics) == (failing not in ("mla_layers", "compile"))
    assert ("mean_ttft_ms" in metrics) == (failing not in ("mla_serving", "compile"))
    assert "output_tok_s" in {row["metric"] for row in report["rows"]}


def test_a_plot(stub: Path, tmp_path: Path) -> None:
    path = tmp_path / "plot.html"
    assert main([*TINY, *ONCE, "--peers", str(stub), "--plot", str(path)]) == 0
    page = html.unescape(path.read_text())
    for text in ("Decode only, bfloat16", "Decode and prefill, float32", "exposed, 32 × 512 cached"):
        assert text in page
    assert "output_tok_s ÷ vllm's = 1.25" in page


@pytest.mark.parametrize(
    "options",
    [
        ["--parts", "other"],
        ["--systems", "piecework"],
        ["--layer-shape", "v3"],
        ["--random-model", "llama-100m"],
        ["--dtypes", "float64"],
        ["--repeats", "0"],
        ["--chats", "0"],
        ["--out", "no/such/directory/file"],
    ],
)
def test_wrong_usage(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_mla, "measure_mla", lambda *a, **k: pytest.fail("it was measured"))
    with pytest.raises(SystemExit) as caught:
        main(["bench", "mla", *options])
    assert caught.value.code == 2


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    def measure(settings: MlaSettings, *, on_progress: Any) -> Measured:
        seen.append(settings)
        return Measured((), (), frozenset())

    monkeypatch.setattr(bench_mla, "measure_mla", measure)
    assert main(["bench", "mla", "--systems", "exposed,opaque"]) == 0
    options = ["--intermediate", "10944", "--layers", "3", "--context", "64", "--random-model", "mla-tiny"]
    assert main(["bench", "mla", "--systems", "exposed,opaque", *options, "--chats", "9"]) == 0
    default, other = seen
    assert default == MlaSettings(systems=("exposed", "opaque"))
    assert (LITE.hidden, LITE.heads, LITE.kv_rank, LITE.rope, LITE.nope, LITE.value) == (2048, 16, 512, 64, 128, 128)
    assert (other.shape.intermediate, other.shape.hidden, other.layers) == (10944, 2048, 3)
    assert (other.batches, other.model) == (lite_batches(64), RANDOM_MODELS["mla-tiny"])
    assert other.chats == ChatLoad(requests=9)


def row(system: str, metric: str, value: float, regime: str | None = None) -> Row:
    return Row(Key(system, 2, metric, "bfloat16", 8, regime=regime), value, n=1, min=value, max=value)


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
def test_goals_beside_the_opaque_form(metric: str, regime: str | None, exposed: float, text: str) -> None:
    rows = [row("exposed", metric, exposed, regime), row("opaque", metric, 1.0, regime)]
    assert [str(goal) for goal in check_mla_goals(rows)] == [text]
    assert check_mla_goals(rows[:1]) == ()
    (goal,) = check_mla_goals(rows)
    assert goal.to_json().get("regime") == regime


def test_forms_are_only_compared_at_the_same_regime() -> None:
    assert check_mla_goals([row("exposed", "tok_s", 1.0, "decode"), row("opaque", "tok_s", 1.0, "mixed")]) == ()
