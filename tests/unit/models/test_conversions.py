"""Parameters are made of what transformers writes to a checkpoint, and of what a module has in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from piecework.bundle.plan import Recipe
from piecework.bundle.recipes import Take, source_from_json, source_to_json, takes
from piecework.bundle.run.constants import as_source, make_constants
from piecework.models.adapter import build_causal_lm
from piecework.spec.model_spec import ModelSpec
from tests.unit.models.tiny import reference_model, write_config

CONVERTED = ["mixtral", "granitemoe", "qwen2_moe", "gpt_neox", "gpt_oss"]


@pytest.mark.parametrize("family", CONVERTED)
def test_weights_are_those_of_the_model_that_was_saved(family: str, tmp_path: Path) -> None:
    model_dir = write_config(tmp_path, family, num_hidden_layers=2)
    model: Any = reference_model(model_dir)
    model.save_pretrained(model_dir)
    request = build_causal_lm(ModelSpec.of(model_dir, dtype="float32", max_tokens=64))
    recipes = [
        Recipe(name, tuple(parameter.shape), "float32", source=request.sources.get(name, Take(name, parameter.shape)))
        for name, parameter in request.module.named_parameters()
    ]
    wanted = dict(model.named_parameters())
    stored = load_file(model_dir / "model.safetensors")
    assert family == "gpt_oss" or not wanted.keys() <= stored.keys()
    for source in (as_source(stored), as_source(model)):
        made = make_constants(recipes, source=source, literals={}, device="cpu")
        assert all(torch.equal(tensor, wanted[recipe.name]) for recipe, tensor in zip(recipes, made, strict=True))


def test_the_other_name_of_a_tensor_is_written_and_read() -> None:
    take = Take("block.gate.weight", (4, 8), also="mlp.gate.weight")
    assert source_from_json(source_to_json(take)) == take
    assert list(takes(take)) == [take]
    with pytest.raises(ValueError, match="a weight's source"):
        source_from_json(["take", "a", [1], "b", "c"])
