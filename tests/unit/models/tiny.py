"""Tiny models of every supported family, and the adapter's module with real weights as an eager model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from piecework.graph.request import CaptureRequest
from piecework.models.adapter import build_causal_lm

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 12},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
}


def config_dict(family: str, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a tiny model."""
    return {
        "model_type": family,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 131,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
        **FAMILIES[family],
        **changes,
    }


def write_config(directory: Path, family: str, **changes: Any) -> Path:
    """Write config.json into `directory` and return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_dict(family, **changes)))
    return directory


def reference_model(model_dir: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return transformers' own model with random weights and eager attention."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.from_pretrained(model_dir)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


class EagerModel:
    """The adapter's module with real weights, behind the engine's protocol for loaded models."""

    def __init__(self, request: CaptureRequest, weights: Mapping[str, Tensor]) -> None:
        self.request = request
        request.module.load_state_dict(weights, strict=True, assign=True)
        request.module.tie_weights()
        self.num_runs = 0

    def make_states(self, sizes: Mapping[str, int]) -> None:
        for name, state in self.request.states.items():
            shape = [sizes[d] if isinstance(d, str) else d for d in state.shape]
            owner, _, attribute = name.rpartition(".")
            # what was never written must not be seen
            filled = torch.full(shape, 1e4, dtype=getattr(torch, state.dtype))
            setattr(self.request.module.get_submodule(owner), attribute, filled)

    def run(self, inputs: Mapping[str, Tensor | int]) -> list[Tensor]:
        assert list(inputs) == [given.name for given in self.request.inputs]
        self.num_runs += 1
        with torch.inference_mode():
            return [self.request.call(self.request.module, inputs)]


def eager_pair(directory: Path, family: str, *, max_tokens: int = 64, **changes: Any) -> tuple[nn.Module, EagerModel]:
    """Return transformers' model and the adapter's, with the same weights."""
    model_dir = write_config(directory, family, **changes)
    reference = reference_model(model_dir)
    model = EagerModel(build_causal_lm(model_dir, max_tokens=max_tokens), reference.state_dict())
    return reference, model
