"""A DeepSeek-V2 of any shape with random weights and dense MLPs, as a directory in Hugging Face layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from piecework.bench.synthetic import BOS, EOS, MAX_POSITIONS, write_tokenizer, write_weights


@dataclass(frozen=True)
class LatentShape:
    """The sizes of a model with latent attention, apart from its layers.

    Args:
        hidden, heads, intermediate, vocab: as in other models; every layer's MLP is dense.
        kv_rank: of the latent vector that is cached.
        rope, nope: rotary dimensions of a head's queries and keys, and those without position.
        value: dimensions of a head's values.
    """

    hidden: int
    heads: int
    intermediate: int
    vocab: int
    kv_rank: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128


def write_deepseek(directory: Path, *, shape: LatentShape, layers: int, dtype: str, weights: bool = True) -> Path:
    """Write config.json and the tokenizer's files into a new directory, and return it.

    Args:
        directory: what to make.
        shape: sizes.
        layers: number of layers.
        dtype: of the weights, "float32" or "bfloat16".
        weights: whether model.safetensors is written as well, with the values of a fixed seed.
    """
    directory.mkdir(parents=True)
    made = deepseek_config(shape, layers=layers, dtype=dtype)
    (directory / "config.json").write_text(json.dumps(made, indent=1) + "\n")
    if weights:
        write_weights(directory, shapes=deepseek_shapes(shape, layers=layers), dtype=dtype)
    write_tokenizer(directory, vocab=shape.vocab)
    return directory


def deepseek_config(shape: LatentShape, *, layers: int, dtype: str) -> dict[str, object]:
    """Return the model's config.json; experts are named because the format wants them, and no layer has any."""
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "vocab_size": shape.vocab,
        "q_lora_rank": None,
        "kv_lora_rank": shape.kv_rank,
        "qk_rope_head_dim": shape.rope,
        "qk_nope_head_dim": shape.nope,
        "v_head_dim": shape.value,
        "first_k_dense_replace": layers,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": dtype,
    }


def deepseek_shapes(shape: LatentShape, *, layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the checkpoint, by name."""
    hidden, wide, heads = shape.hidden, shape.intermediate, shape.heads
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (heads * (shape.nope + shape.rope), hidden),
        "self_attn.kv_a_proj_with_mqa": (shape.kv_rank + shape.rope, hidden),
        "self_attn.kv_a_layernorm": (shape.kv_rank,),
        "self_attn.kv_b_proj": (heads * (shape.nope + shape.value), shape.kv_rank),
        "self_attn.o_proj": (hidden, heads * shape.value),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    return {
        "model.embed_tokens.weight": (shape.vocab, hidden),
        **{f"model.layers.{layer}.{name}.weight": size for layer in range(layers) for name, size in block.items()},
        "model.norm.weight": (hidden,),
        "lm_head.weight": (shape.vocab, hidden),
    }
