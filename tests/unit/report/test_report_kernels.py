"""How many kernels a bundle's layers have and what they move, in every stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from piecework.bundle import Bundle
from piecework.bundle.plan import Plan
from piecework.cli.main import main
from piecework.errors import CorruptBundle, PieceworkError
from piecework.foundation.notes import KERNELS, append_note
from piecework.foundation.traffic import Kernel, kernels_to_json
from piecework.report.inspect import describe
from piecework.report.kernel_counts import Moved, PieceKernels, moved_table, piece_kernels, typical_sizes
from tests.unit.report.layered import Block, Two, compiled, model
from tests.unit.report.test_explain import without_explanation


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return compiled(model({3: {"width": 64}}), tmp_path / "b")


LINEARS = (16 * 16 + 16) * 2 + 32 * 16 + 32 + 16 * 32 + 16
LAYER_WEIGHTS = 4 * (LINEARS + 2 * 16)
"""Bytes of a layer of layered.py: four linear layers with bias, and a norm."""


def test_a_layer_is_what_it_says(bundle: Bundle) -> None:
    (one, many) = describe(bundle, verified=False).moved
    assert (one.sizes, many.sizes) == ({"rows": 1}, {"rows": 32})
    layers = {row.layers: row for row in one.rows if row.part == "layers"}
    # layer 2 leads into layer 3, which is wider; the last layer has the final norm
    assert list(layers) == [(0, 1, 2, 4), (3,), (5,)]
    row = layers[0, 1, 2, 4]
    captured = row.stages[0]
    # out, sum, up, silu, down, sum, norm, inner
    assert (captured.kernels, captured.weight_bytes, row.num_calls) == (8, LAYER_WEIGHTS, 1)
    assert layers[3,].stages[0].weight_bytes == LAYER_WEIGHTS + 4 * (32 * 16 * 2 + 32)
    # read: 2 linear layers of 16 (x), 1 of width 32, silu and 2 sums; native_layer_norm also gives mean and deviation
    reads = 16 + (16 + 16) + 16 + 32 + 32 + (16 + 16) + 16 + 16
    writes = 16 + 16 + 32 + 32 + 16 + 16 + (16 + 2) + 16
    assert captured.other_bytes == 4 * (reads + writes)
    assert {r.layers: r.stages[0].other_bytes for r in many.rows}[0, 1, 2, 4] == 32 * 4 * (reads + writes)


def test_the_parts_sum_up(bundle: Bundle) -> None:
    tables = describe(bundle, verified=False).moved
    assert tables
    for table in tables:
        *parts, total = table.rows
        assert total.part == "in all"
        for stage in range(4):
            for amount in ("kernels", "weight_bytes", "other_bytes"):
                found = [getattr(row.stages[stage], amount) * max(len(row.layers), 1) for row in parts]
                assert sum(found) == getattr(total.stages[stage], amount)
        assert sum(row.num_calls * max(len(row.layers), 1) for row in parts) == total.num_calls == 6


def test_an_eager_bundle_runs_what_passes_left(bundle: Bundle) -> None:
    rows = describe(bundle, verified=False).moved[0].rows
    assert len(rows) > 1
    for row in rows:
        assert row.stages[2] == row.stages[3]


def test_other_sizes(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    report = describe(bundle, verified=False, sizes=[{"rows": 7}])
    assert [table.sizes for table in report.moved] == [{"rows": 7}]
    assert main(["inspect", str(bundle.path), "--at", "rows=7", "--at", "rows=64"]) == 0
    text = capsys.readouterr().out
    assert "at rows = 7 " in text
    assert "at rows = 64 " in text
    for wrong in ({"rows": 65}, {"rows": 0}, {"columns": 1}):
        with pytest.raises(PieceworkError) as caught:
            describe(bundle, verified=False, sizes=[wrong])
        assert caught.value.found == "rows from 1 to 64"
    with pytest.raises(SystemExit):
        main(["inspect", str(bundle.path), "--at", "rows"])


def test_text_and_json(bundle: Bundle) -> None:
    report = describe(bundle, verified=False)
    lines = report.to_text().splitlines()
    start = lines.index("kernels: bytes of weights + of all else")
    assert lines[start + 1].split() == [
        "at",
        "rows",
        "=",
        "1",
        "captured",
        "after",
        "passes",
        "compiled",
        "opaque",
        "ops",
    ]
    assert lines[start + 2].startswith(f"    layers 0-2, 4, each  8: {LAYER_WEIGHTS / 1000:.1f} kB + ")
    value = json.loads(json.dumps(report.to_json()))
    assert value["moved"][0]["rows"][0]["stages"][0]["kernels"] == 8
    captured = value["kernels"][1]["captured"]
    assert captured[1] == ["aten.add.Tensor", [], [["64*rows"], ["64*rows"]], [["64*rows"]]]
    assert [low_high[:2] for low_high in value["kernels"][1]["compiled"]] == [[1, 64]]


def test_two_stacks(tmp_path: Path) -> None:
    module = Two([Block(i) for i in range(3)], [Block(i, width=48) for i in range(4)])
    bundle = compiled(module, tmp_path / "b", example=torch.zeros(4, 16))
    text = describe(bundle, verified=False).to_text()
    assert "layers 0-2 of encoder, each " in text
    assert "layers 0-2 of decoder, each " in text
    assert "layer 3 of decoder " in text


def test_what_old_bundles_do_not_say_is_unknown(bundle: Bundle, tmp_path: Path) -> None:
    explanation = {k: v for k, v in (bundle.explanation() or {}).items() if k != "kernels"}
    for old in (
        without_explanation(bundle, tmp_path / "older"),
        without_explanation(bundle, tmp_path / "old", explanation=explanation),
    ):
        report = describe(old, verified=False)
        assert {stage for table in report.moved for row in table.rows for stage in row.stages} == {
            Moved(None, None, None)
        }
        assert "  unknown  " in report.to_text()


@pytest.mark.parametrize("kernels", [[3], [{"captured": [["a"]]}], [{"captured": 7}], 5])
def test_what_is_no_count_is_an_error(kernels: Any, bundle: Bundle, tmp_path: Path) -> None:
    explanation = {**(bundle.explanation() or {}), "kernels": kernels}
    with pytest.raises(CorruptBundle, match="does not say which kernels"):
        describe(without_explanation(bundle, tmp_path / "wrong", explanation=explanation), verified=False)


def test_libraries_say_it_themselves(write_sample: Any, sample_content: Any, tmp_path: Path) -> None:
    kernels = (Kernel("loops: aten.relu", (("64", "4*s0"),), (("8*s0",),), (("8*s0",),)), Kernel("odd", (), ((),)))
    artifacts = sample_content.artifacts
    noted = tmp_path / "noted.so"
    noted.write_bytes(b"library")
    append_note(noted, json.dumps(kernels_to_json(kernels)), mark=KERNELS)
    plan = Plan.from_json(sample_content.plan)
    bundle = write_sample(tmp_path / "b")
    place = bundle.artifact_path(plan.pieces[0].ranges[0].artifact)
    place.write_bytes(noted.read_bytes())
    pieces = piece_kernels(bundle, plan)
    assert [form[:2] for form in pieces[0].compiled] == [(1, 1), (2, 8192)]
    assert pieces[0].compiled[0][2] == kernels
    assert pieces[0].compiled[1][2] is None
    assert len(artifacts) == 2


def test_the_range_decides_and_what_cannot_be_computed_is_unknown() -> None:
    small, large = (Kernel("a", (("8", "rows"),), (("2*rows",),)),), (Kernel("b", writes=((),)), Kernel("c"))
    piece = PieceKernels(None, None, small, ((1, 4, small), (5, 64, large)))
    unknown = Moved(None, None, None)
    assert piece.moved({"rows": 3}, primary=3) == (unknown, unknown, Moved(1, 3, 6), Moved(1, 3, 6))
    assert piece.moved({"rows": 9}, primary=9)[2:] == (Moved(1, 8, 18), Moved(2, 0, None))
    assert piece.moved({"rows": 99}, primary=99)[3] == unknown
    assert piece.moved({}, primary=1)[2] == Moved(1, None, None)


def test_a_plan_without_sizes_has_one_table(bundle: Bundle) -> None:
    plan = Plan.from_json(bundle.plan())
    assert typical_sizes(plan) == ({"rows": 1}, {"rows": 32})
    table = moved_table(plan, piece_kernels(bundle, plan), sizes={})
    assert table.rows[-1].stages == moved_table(plan, piece_kernels(bundle, plan), sizes={"rows": 1}).rows[-1].stages
