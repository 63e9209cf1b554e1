"""Labels of a plan's steps, and what they show in a trace."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import piecework
from piecework.report.step_labels import step_labels
from tests.unit.report.layered import OP, Block, Two, compiled, model


def test_every_step_has_its_piece_or_op_and_its_layers(tmp_path: Path) -> None:
    module = model()
    loaded = piecework.load(compiled(module, tmp_path / "b"), weights=module)
    labels = step_labels(loaded.plan)
    pieces = [label for label in labels if label.startswith("piece ")]
    assert [label for label in labels if label not in pieces] == [f"{OP} layers {layer}" for layer in range(6)]
    where = [label.partition("] ")[2] for label in pieces]
    assert where == ["layers 0", *(f"layers {layer}-{layer + 1}" for layer in range(5)), "layers 5"]
    fingerprints = [piece.fingerprint[:8] for piece in loaded.plan.pieces]
    assert pieces[0].startswith(f"piece 0 [{fingerprints[0]}] ")
    assert len({label.partition("]")[0] for label in pieces}) == len(fingerprints) == 3


def test_two_stacks_are_told_apart(tmp_path: Path) -> None:
    module = Two([Block(n) for n in range(2)], [Block(n, width=48) for n in range(2)])
    loaded = piecework.load(compiled(module, tmp_path / "b", example=torch.zeros(4, 16)), weights=module)
    assert any("encoder 1" in label and "decoder 0" in label for label in step_labels(loaded.plan))


def test_a_labelled_model_shows_its_steps_in_a_trace_and_nothing_once_it_no_longer_is(tmp_path: Path) -> None:
    module = model(layers=2)
    loaded = piecework.load(compiled(module, tmp_path / "b"), weights=module)
    ids = torch.arange(5)
    expected = loaded(ids)
    labels = step_labels(loaded.plan)

    def names() -> list[str]:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            torch.testing.assert_close(loaded(ids), expected)
        profiler.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        return [e["name"] for e in sorted(events, key=lambda e: float(e.get("ts", 0))) if e["name"] in labels]

    assert names() == []
    loaded.label_steps(labels)
    assert names() == list(labels)
    loaded.label_steps(None)
    assert names() == []
