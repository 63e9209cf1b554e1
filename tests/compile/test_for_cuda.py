"""What a GPU's bundle is made of, without a GPU: nothing on the host, and none of the CPU's own operators."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from piecework.bundle.plan import Plan
from piecework.bundle.store.directory import DirectoryStore
from piecework.compiler.model import compile_model
from piecework.foundation.environment import Environment
from piecework.spec.model_spec import ModelSpec
from tests.unit.models.tiny import write_config


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch knows no CUDA, not even of fake tensors")
@pytest.mark.parametrize(
    ("family", "mla"), [("llama", "exposed"), ("deepseek_v3", "exposed"), ("deepseek_v3", "opaque")]
)
def test_all_of_a_bundle_is_on_the_gpu(home: Path, tmp_path: Path, family: str, mla: str) -> None:
    made = compile_model(
        ModelSpec.of(
            write_config(tmp_path / "model", family),
            dtype="bfloat16",
            max_tokens=64,
            mla=mla,
            backend="eager",
            pack_linear="own",
            device="cuda",
        ),
        store=DirectoryStore(home),
        environment=Environment(store_root=home),
        check_weights=False,
    )
    plan = Plan.from_json(made.bundle.plan())
    assert {piece.device for piece in plan.pieces} | {state.device for state in plan.states} == {"cuda"}
    assert {given.device for given in plan.inputs if given.shape is not None} == {"cuda"}
    assert not any(recipe.pack for recipe in plan.recipes)
    assert not plan.kernels
    artifacts = {made.bundle.artifact_path(form.artifact) for piece in plan.pieces for form in piece.ranges}
    for text in (path.read_text() for path in artifacts):
        assert '"cpu"' not in text
        assert "mkldnn" not in text
        assert "head_matmul_cpu" not in text
        json.loads(text)
