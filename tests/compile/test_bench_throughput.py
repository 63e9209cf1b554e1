"""`piecework bench throughput` in real processes, with the eager backend and a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from piecework.cli.main import main


@pytest.mark.slow
def test_from_nothing_to_figures_and_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--random-llama", "tiny", "--requests", "3", "--input", "9", "--output", "5", "--dtype", "float32"]
    options += ["--repeats", "1", "--runs", "1", "--systems", "piecework", "--backend", "eager"]
    profile = tmp_path / "profile"
    assert main(["bench", "throughput", *options, "--profile", str(profile), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["metric"]: row for row in report["rows"]}
    assert set(rows) == {"cold_s", "output_tok_s", "total_tok_s", "one_request_tok_s", "first_token_s"}
    # three times 5 tokens of three times 9 + 5
    assert rows["total_tok_s"]["value"] == pytest.approx(rows["output_tok_s"]["value"] * 14 / 5, rel=0.05)
    assert all(row["value"] > 0 for row in report["rows"])
    (path,) = profile.iterdir()
    assert report["notes"][-1] == f"profile of 5 forwards: {path}"  # others tell how busy the machine was
    names = {event["name"] for event in json.loads(path.read_text())["traceEvents"]}
    assert {"piecework::attention model.layers 0", "piecework::attention model.layers 1"} <= names
    assert any(name.startswith("piece 1 [") and name.endswith("model.layers 0-1") for name in names)
