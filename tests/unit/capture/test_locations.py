"""Which source line a node has: the model's own, be it of a user, of a library, or a layer of ours in its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from piecework.capture.capture import capture
from piecework.capture.locations import is_models, locations_of, source_of
from piecework.capture.request import CaptureRequest, TensorInput
from piecework.compiler.explain import captured_subject
from piecework.compiler.split import Piece, split
from piecework.models import latent_attention, paged_attention
from piecework.models.adapter import build_causal_lm
from piecework.spec.model_spec import ModelSpec
from tests.unit.models.tiny import write_config

HERE = f"tests/unit/capture/{Path(__file__).name}"


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y = y + 1
        return scaled(y)


def scaled(x: Tensor) -> Tensor:
    return x.relu() / 3


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if line.strip() == text)


def test_lines_of_one_function_are_a_range() -> None:
    inputs = (TensorInput("x", (4,), "float32"),)
    captured = capture(CaptureRequest(Norm(), lambda module, given: module(given["x"]), inputs, {}))
    (piece,) = split(captured)
    assert isinstance(piece, Piece)
    first, last, inner = (line_of(t) for t in ("y = x * 2", "y = y + 1", "return x.relu() / 3"))
    assert locations_of(piece.origins) == [f"{HERE}:{n}" for n in (first, last, inner, inner)]
    forward = f"{HERE}:{first}-{last} in Norm.forward"
    assert source_of(piece.origins) == f"{forward}, :{inner} in scaled"
    assert source_of(piece.origins[:1]) == f"{HERE}:{first} in Norm.forward"
    assert source_of([torch.fx.Graph().placeholder("x")]) == ""


@pytest.mark.parametrize("mla", ["exposed", "opaque"])
def test_our_layers_have_lines(mla: str, tmp_path: Path) -> None:
    request = build_causal_lm(ModelSpec.of(write_config(tmp_path, "deepseek_v2"), max_tokens=64, mla=mla))
    explanation = captured_subject(request, name="deepseek").explanation
    assert explanation is not None
    files = {line.rpartition(":")[0] for listing in explanation.listings for line in listing.locations}
    assert "transformers/models/deepseek_v2/modeling_deepseek_v2.py" in files
    names = {"deepseek.py", "routed_experts.py", "latent_attention.py"}
    assert {f"piecework/models/{name}" for name in names} <= files
    (line,) = explanation.op_locations["piecework::moe_experts.default"]
    assert line.startswith("piecework/models/routed_experts.py:")


def test_functions_that_a_model_is_made_to_call_have_none(tmp_path: Path) -> None:
    request = build_causal_lm(ModelSpec.of(write_config(tmp_path, "llama"), max_tokens=64))
    asked = is_models(request.module)
    assert not asked(paged_attention.__file__)
    assert not asked(latent_attention.__file__)
    assert not asked(torch.nn.modules.linear.__file__)
    explanation = captured_subject(request, name="llama").explanation
    assert explanation is not None
    (line,) = explanation.op_locations["piecework::attention.default"]
    assert line.startswith("transformers/models/llama/modeling_llama.py:")
