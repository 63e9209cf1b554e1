"""What the forward without values finds out about a model: its caches, and that it can't be paged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from piecework.errors import UnsupportedModelError
from piecework.models.adapter import build_causal_lm
from piecework.spec.model_spec import ModelSpec
from tests.unit.models.tiny import config_dict, write_config

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt_neox_japanese": (
        {"architectures": ["GPTNeoXJapaneseForCausalLM"]},
        "GPTNeoXJapaneseAttention",  # masks scores with a tensor of its own, which is a bias for each query
    ),
    "roformer": ({"architectures": ["RoFormerForCausalLM"], "is_decoder": True}, "positions from its cache's length"),
    "xglm": (
        {"architectures": ["XGLMForCausalLM"], "d_model": 64, "attention_heads": 4, "ffn_dim": 96},
        "modeling_xglm",
    ),
    "diffllama": ({"architectures": ["DiffLlamaForCausalLM"]}, "attends twice"),
    "qwen3": ({"architectures": ["Qwen3ForCausalLM"], "is_causal": False}, "tokens that come later"),
}


def build(model_dir: Path) -> Any:
    return build_causal_lm(ModelSpec.of(model_dir, dtype="float32", max_tokens=64))


@pytest.mark.parametrize("model_type", REFUSED)
def test_attention_past_the_interfaces_is_refused(model_type: str, tmp_path: Path) -> None:
    changes, found = REFUSED[model_type]
    with pytest.raises(UnsupportedModelError) as error:
        build(write_config(tmp_path, "llama", model_type=model_type, **changes))
    assert found in error.value.found
    assert "piecework.compile" in error.value.try_


def test_a_model_type_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="unheard_of"):
        build(write_config(tmp_path, "llama", model_type="unheard_of"))


def test_caches_have_each_layers_own_heads(tmp_path: Path) -> None:
    states = build(write_config(tmp_path, "falcon")).states
    assert [state.shape for state in states.values()] == [(2, "blocks", 16, 4, 16)] * 3
    states = build(write_config(tmp_path / "phi3", "phi3")).states
    assert [state.shape for state in states.values()] == [(2, "blocks", 16, 2, 16)] * 3


def test_a_cache_is_a_layers_own_where_layers_are_alike(tmp_path: Path) -> None:
    request = build(write_config(tmp_path, "llama", num_hidden_layers=5))
    caches = {id(request.module.get_submodule(name.rpartition(".")[0])) for name in request.states}
    assert len(caches) == len(request.states) == 5
    assert config_dict("llama")["num_hidden_layers"] == 3
