"""`piecework bench mla` in real processes, with the eager backend and tiny models."""

from __future__ import annotations

import json

import pytest

from piecework.bench.systems.mla import SERVING_METRICS
from piecework.cli.main import main


@pytest.mark.slow
def test_from_nothing_to_figures_of_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--layer-shape",
        "tiny",
        "--random-model",
        "mla-tiny",
        "--backend",
        "eager",
        "--systems",
        "exposed,opaque",
    ]
    options += ["--dtypes", "float32", "--dtype", "float32", "--context", "40", "--seconds", "0.01", "--repeats", "1"]
    options += ["--chats", "6", "--chat-input", "20", "--chat-output", "8", "--max-length", "64"]
    options += ["--end-to-end-repeats", "1", "--parts", "layers,serving"]
    assert main(["bench", "mla", *options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row["value"] > 0 for row in rows)
    for form in ("exposed", "opaque"):
        ours = [row for row in rows if row["system"] == form]
        assert [(row["regime"], row["batch"], row["context"]) for row in ours if row["metric"] == "tok_s"] == [
            ("decode", 1, 40),
            ("decode", 8, 40),
            ("decode", 32, 40),
            ("prefill", 4, 0),
            ("prefill", 4, 40),
            ("mixed", 17, 40),
        ]
        assert {row["metric"] for row in ours} == {"tok_s", *SERVING_METRICS}
        rates = {row["metric"]: row for row in ours}
        generated = int(rates["output_throughput"]["note"].split()[-2])
        per_request = rates["output_throughput"]["value"] / rates["request_throughput"]["value"]
        assert per_request == pytest.approx(generated / 6, rel=1e-3)
