import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from piecework.bundle import Bundle, BundleContent
from piecework.bundle.plan import Plan
from piecework.errors import CorruptBundle
from piecework.report import describe

Write = Callable[..., Bundle]


def test_counts(tmp_path: Path, write_sample: Write) -> None:
    bundle = write_sample(tmp_path / "b")
    report = describe(bundle, verified=True)
    assert report.num_pieces == 3
    assert [piece.num_uses for piece in report.unique_pieces] == [2, 1]
    assert [piece.num_constants for piece in report.unique_pieces] == [1, 2]
    assert [(a.min, a.max) for a in report.unique_pieces[0].artifacts] == [(1, 1), (2, 8192)]
    assert [a.size_bytes for a in report.unique_pieces[0].artifacts] == [700, 750]
    assert report.opaque_ops == {"piecework::attention": 2}
    assert report.recipes == {
        "take float32, pack mkldnn_linear": 2,
        "take float32": 1,
        "literal float32": 1,
    }
    assert report.inputs == ("input_ids",)
    assert len(report.states) == 2
    assert report.size_bytes == bundle.size_bytes
    assert report.facts == bundle.facts
    assert report.record.counts == {"pieces": 3}


def test_json_is_json_and_complete(tmp_path: Path, write_sample: Write) -> None:
    bundle = write_sample(tmp_path / "b")
    value = json.loads(json.dumps(describe(bundle, verified=False).to_json()))
    assert value["verified"] is False
    assert value["num_pieces"] == 3
    assert value["num_unique_pieces"] == 2
    assert value["unique_pieces"][0]["fingerprint"] == "ab" * 32
    assert value["facts"]["option/dtype"] == "float32"
    assert value["record"]["phases"] == {"capture": 1.5, "compile": 8.25}
    assert value["sizes"] == {"tokens": [1, 8192], "blocks": [1, 4096]}
    assert value["identity"] == {"model": "tiny", "dtype": "float32"}


def test_text_names_all_of_it(tmp_path: Path, write_sample: Write) -> None:
    text = describe(write_sample(tmp_path / "b"), verified=True).to_text()
    for line in (
        "verified       every file matches its digest",
        "pieces         3, of which 2 unique",
        "model          tiny",
        "  tokens: 1 to 8192",
        "       2 × abababababab: 7 ops, 1 constants, cpu",
        "         tokens 1 to 1: ",
        "       2 × piecework::attention",
        "       2 × take float32, pack mkldnn_linear",
        "       2 × 2×blocks×16×2×64 float32 cpu (model.layers.0.self_attn.kv_cache, …)",
        "  option/dtype = float32",
        "  model/config = 121212121212",
        "  all well",
    ):
        assert any(line in found for found in text.splitlines()), line


def test_an_empty_plan_has_no_empty_sections(tmp_path: Path, write_sample: Write) -> None:
    plan = Plan(
        sizes={},
        primary="",
        inputs=(),
        states=(),
        recipes=(),
        pieces=(),
        instances=(),
        steps=(),
        num_slots=0,
        output_slots=(),
        structure=None,
    )
    text = describe(write_sample(tmp_path / "b", plan=plan.to_json(), artifacts={}), verified=False).to_text()
    assert "states" not in text
    assert "no (use --verify)" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.pop("steps"),
        lambda plan: plan.update(steps=[[99, [], []]]),
        lambda plan: plan.update(steps=[[-1, [], []]]),
        lambda plan: plan.update(steps=[1]),
        lambda plan: plan.update(pieces=[{}]),
        lambda plan: plan.update(instances=[[5, []]]),
        lambda plan: plan["pieces"][0]["ranges"][0].update(artifact="ef" * 32),
    ],
)
def test_a_plan_that_is_none(
    change: Callable[[dict[str, Any]], object], tmp_path: Path, sample_content: BundleContent, write_sample: Write
) -> None:
    plan = json.loads(json.dumps(sample_content.plan))
    change(plan)
    with pytest.raises(CorruptBundle):
        describe(write_sample(tmp_path / "b", plan=plan), verified=False)
