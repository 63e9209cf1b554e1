"""Attention of transformers' models on `piecework::attention`, by transformers' own attention interface."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from piecework.capture.request import TensorInput
from piecework.models.adapted import AdaptedModel
from piecework.models.batch import BLOCK_SIZE, ForwardBatch
from piecework.models.meta import meta_parameters
from piecework.ops import attention as _attention  # noqa: F401  registers piecework::attention
from piecework.spec.config import ModelConfig

ATTENTION: Final = "piecework"
KV_CACHE: Final = "kv_cache"


def adapt_paged(config: ModelConfig, hf_config: PretrainedConfig, *, dtype: torch.dtype) -> AdaptedModel:
    """Return transformers' model, unchanged but for its attention function; parameters and caches in `dtype`."""
    AttentionInterface.register(ATTENTION, paged_attention)
    with meta_parameters(), no_init_weights():
        module: nn.Module = AutoModelForCausalLM.from_config(hf_config, attn_implementation=ATTENTION, dtype=dtype)
    return AdaptedModel(module, add_kv_caches(module, config, dtype=str(dtype).removeprefix("torch.")))


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    batch: ForwardBatch,
    **_ignored: object,
) -> tuple[Tensor, None]:
    """Serve as transformers' attention function: query [1, H, T, D], key/value [1, K, T, D] -> [1, T, H, D].

    Of the module only the `kv_cache` is read, so that nothing tells sibling layers apart.
    """
    out = torch.ops.piecework.attention(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        module.kv_cache,
        batch.slot_mapping,
        batch.block_tables,
        batch.seq_lens,
        batch.query_start,
        batch.num_decode_tokens,
        scaling,
        sliding_window or 0,
        softcap or 0.0,
    )
    return out.unsqueeze(0), None


def add_kv_caches(module: nn.Module, config: ModelConfig, *, dtype: str) -> dict[str, TensorInput]:
    """Give every attention module a `kv_cache` buffer on the meta device; return them by qualified name.

    An attention module is known by what transformers gives all of those that use its attention interface: a
    `layer_idx` and `num_key_value_groups`.
    """
    states = {}
    for name, part in module.named_modules():
        if hasattr(part, "layer_idx") and hasattr(part, "num_key_value_groups"):
            shape = (BLOCK_SIZE, config.num_kv_heads, config.head_dim)
            cache = torch.empty((2, 1, *shape), dtype=getattr(torch, dtype), device="meta")
            part.register_buffer(KV_CACHE, cache, persistent=False)
            qualified = f"{name}.{KV_CACHE}"
            states[qualified] = TensorInput(qualified, (2, "blocks", *shape), dtype)
    return states
