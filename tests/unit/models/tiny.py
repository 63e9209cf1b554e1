"""Tiny models of every supported family, and the adapter's module with real weights as an eager model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from piecework.capture.request import CaptureRequest
from piecework.models.adapter import build_causal_lm
from piecework.spec.model_spec import ModelSpec

_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SCORED: dict[str, Any] = {**_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 12},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
}
"""The families with which everything is tried."""

MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 24,
        "sliding_window": 12,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 24,
        "sliding_window": 12,
        "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"architectures": ["Phi3ForCausalLM"]},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        **_EXPERTS,
        "num_experts": 4,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], **_EXPERTS, "num_experts": 4, "head_dim": 24},
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        **_EXPERTS,
        "num_local_experts": 4,
        "head_dim": 16,
        "sliding_window": 12,
    },
    "glm4": {"architectures": ["Glm4ForCausalLM"], "head_dim": 16},
    "glm4_moe": {"architectures": ["Glm4MoeForCausalLM"], **_SCORED, "head_dim": 16},
    "llama4_text": {
        "architectures": ["Llama4ForCausalLM"],
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 80,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 12,
        "no_rope_layers": [1, 0, 1],
        "floor_scale": 4,
    },
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
    "granite": {"architectures": ["GraniteForCausalLM"], "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "granitemoe": {
        "architectures": ["GraniteMoeForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.2,
    },
    "starcoder2": {"architectures": ["Starcoder2ForCausalLM"], "sliding_window": 12},
    "gpt_neox": {"architectures": ["GPTNeoXForCausalLM"], "rotary_pct": 0.5},
    "opt": {"architectures": ["OPTForCausalLM"], "ffn_dim": 96, "word_embed_proj_dim": 64},
    "falcon": {"architectures": ["FalconForCausalLM"], "num_kv_heads": 2, "new_decoder_architecture": True},
    "bloom": {"architectures": ["BloomForCausalLM"], "n_head": 4},
    "mpt": {"architectures": ["MptForCausalLM"], "d_model": 64, "n_heads": 4, "max_seq_len": 512},
    "falcon_alibi": {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "alibi": True,
        "num_attention_heads": 6,  # no power of two, so that transformers' biases are rounded
        "hidden_size": 96,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "gptj": {"architectures": ["GPTJForCausalLM"], "n_embd": 64, "n_head": 4, "rotary_dim": 8},
    "codegen": {"architectures": ["CodeGenForCausalLM"], "n_embd": 64, "n_head": 4, "rotary_dim": 8},
}
"""Families whose windows, experts, rotary embeddings and blocks are of other kinds."""

_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 12, "mamba_n_groups": 2}

HYBRID_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "architectures": ["Qwen3NextForCausalLM"],
        **_EXPERTS,
        **_DELTA,
        "num_experts": 4,
        "shared_expert_intermediate_size": 48,
        "head_dim": 16,
    },
    "qwen3_5_text": {"architectures": ["Qwen3_5ForCausalLM"], **_DELTA, "head_dim": 16},
    "olmo_hybrid": {"architectures": ["OlmoHybridForCausalLM"], **_DELTA},
    "bamba": {"architectures": ["BambaForCausalLM"], **_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        **_MAMBA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 48,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "falcon_h1": {"architectures": ["FalconH1ForCausalLM"], **_MAMBA, "mamba_d_ssm": 128, "head_dim": 16},
    "nemotron_h": {
        "architectures": ["NemotronHForCausalLM"],
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 12,
        "n_groups": 2,
        "head_dim": 16,
    },
    "zamba2": {
        "architectures": ["Zamba2ForCausalLM"],
        "mamba_d_state": 12,
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "num_mem_blocks": 1,
        "use_shared_attention_adapter": False,
    },
    "mamba2": {"architectures": ["Mamba2ForCausalLM"], "num_heads": 8, "head_dim": 16, "state_size": 12, "n_groups": 2},
    "mamba": {"architectures": ["MambaForCausalLM"], "state_size": 12},
    "falcon_mamba": {"architectures": ["FalconMambaForCausalLM"], "state_size": 12},
    "jamba": {
        "architectures": ["JambaForCausalLM"],
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 12,
        "num_experts": 1,
    },
    "lfm2": {"architectures": ["Lfm2ForCausalLM"], "layer_types": ["conv", "full_attention", "conv"]},
}
"""Models with recurrent states: gated delta nets, Mamba2, Mamba, and convolutions alone."""

_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 32,
}
_V2: dict[str, Any] = {**_LATENT, "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}
_V3: dict[str, Any] = {**_LATENT, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}

LATENT_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **_V2,
        "q_lora_rank": None,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "topk_method": "greedy",
        "rope_parameters": _YARN,
    },
    "deepseek_v2_groups": {
        **_V2,
        "q_lora_rank": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
    },
    "deepseek_v3": {
        **_V3,
        "q_lora_rank": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "num_nextn_predict_layers": 1,
        "rope_parameters": _YARN,
    },
    "deepseek_v3_halves": {
        **_V3,
        "q_lora_rank": None,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "rope_interleave": False,
        "attention_bias": True,
    },
}
"""Models with latent attention, in every form that their configs have."""


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
        **{**FAMILIES, **MORE_FAMILIES, **HYBRID_FAMILIES, **LATENT_FAMILIES}[family],
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
    attention = "sdpa" if getattr(config, "alibi", False) else "eager"  # Falcon's own adds its biases twice
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("bias"):
            nn.init.normal_(tensor, std=0.2)
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

    def run(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        given = {wanted.name: inputs[wanted.name] for wanted in self.request.inputs}
        sizes = {"tokens": len(inputs["input_ids"]), "decode_tokens": inputs["num_decode_tokens"]}
        call = self.request.call
        for variant in reversed(self.request.variants):
            if variant.where.holds(sizes):
                call = variant.call
        self.num_runs += 1
        with torch.inference_mode():
            return [call(self.request.module, given)]


def eager_pair(
    directory: Path, family: str, *, max_tokens: int = 64, mla: str = "exposed", **changes: Any
) -> tuple[nn.Module, EagerModel]:
    """Return transformers' model and the adapter's, with the same weights."""
    model_dir = write_config(directory, family, **changes)
    reference = reference_model(model_dir)
    model = EagerModel(build_causal_lm(ModelSpec.of(model_dir, max_tokens=max_tokens, mla=mla)), reference.state_dict())
    return reference, model
