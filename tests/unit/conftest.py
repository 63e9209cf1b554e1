"""A small bundle, whose artifacts are any bytes: nothing here loads them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from piecework.bundle import Bundle, BundleContent, Fact, environment_facts, write_bundle
from piecework.bundle.plan import Instance, OpStep, PieceStep, Plan, PlanInput, Recipe, ShapeRange, State, UniquePiece
from piecework.bundle.record import Record


def sample_plan(artifacts: Mapping[str, Path]) -> Plan:
    first, second = artifacts
    return Plan(
        sizes={"tokens": (1, 8192), "blocks": (1, 4096)},
        primary="tokens",
        inputs=(PlanInput("input_ids", shape=("tokens",), dtype="int64", device="cpu"),),
        states=tuple(
            State(f"model.layers.{layer}.self_attn.kv_cache", (2, "blocks", 16, 2, 64), dtype="float32", device="cpu")
            for layer in range(2)
        ),
        recipes=(
            Recipe("model.embed_tokens.weight", (128, 64), "float32"),
            Recipe("model.layers.0.weight", (64, 64), "float32", pack="mkldnn_linear"),
            Recipe("model.layers.1.weight", (64, 64), "float32", pack="mkldnn_linear"),
            Recipe("inv_freq", (32,), "float32", literal=True),
        ),
        pieces=(
            UniquePiece(
                "ab" * 32, "ac" * 32, (ShapeRange(1, 1, first), ShapeRange(2, 8192, second)), num_ops=7, num_constants=1
            ),
            UniquePiece("cd" * 32, "ce" * 32, (ShapeRange(1, 8192, second),), num_ops=3, num_constants=2),
        ),
        instances=(Instance(0, (1,)), Instance(0, (2,)), Instance(1, (0, 3))),
        steps=(
            PieceStep(0, (0,), (1,)),
            OpStep("piecework::attention", ({"slot": 1}, {"state": 0}), {}, (2,)),
            PieceStep(1, (2,), (3,)),
            OpStep("piecework::attention", ({"slot": 3}, {"state": 1}), {}, (4,)),
            PieceStep(2, (4,), (5,)),
        ),
        num_slots=6,
        output_slots=(5,),
        structure={"leaf": 0},
    )


@pytest.fixture
def sample_content(tmp_path: Path) -> BundleContent:
    artifacts = {}
    for content in (b"first library " * 50, b"second library " * 50):
        path = tmp_path / f"{hashlib.sha256(content).hexdigest()}.so"
        path.write_bytes(content)
        artifacts[path.name] = path
    return BundleContent(
        plan=json.loads(json.dumps(sample_plan(artifacts).to_json())),
        artifacts=artifacts,
        facts=(*environment_facts(), Fact("option", "dtype", "float32"), Fact("model", "config", "12" * 32)),
        record=Record(phases={"capture": 1.5, "compile": 8.25}, counts={"pieces": 3}, notes=("all well",)),
        constants=b"literals",
        identity={"model": "tiny", "dtype": "float32"},
    )


@pytest.fixture
def write_sample(sample_content: BundleContent, tmp_path: Path) -> Callable[..., Bundle]:
    """Return a function that writes the sample to a path; keywords replace parts of it."""

    def write(path: Path, **changes: Any) -> Bundle:
        extract_root = changes.pop("extract_root", tmp_path / "home")
        return write_bundle(path, replace(sample_content, **changes), extract_root=extract_root)

    return write
