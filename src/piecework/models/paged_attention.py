"""Attention of transformers' models on `piecework::attention`, by transformers' own interfaces.

A model is reached by its attention interface (which function attends), its mask interface (what a token may see) and
its cache interface (what came before). None of its code is replaced, and no model is known by name.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from piecework.models.adapted import AdaptedModel
from piecework.models.batch import ForwardBatch
from piecework.models.cache_interface import Sight, sight
from piecework.models.conversions import checkpoint_sources
from piecework.models.direct_attention import build_by_name, direct_parts, redirect
from piecework.models.meta import meta_parameters
from piecework.models.recurrent_mixers import keep_states
from piecework.models.rope import fixed_frequencies
from piecework.models.trial import TRIAL, UNKNOWN_MASK, give_states, try_attention, unreached
from piecework.ops import attention as _attention  # noqa: F401  registers piecework::attention
from piecework.spec.config import ModelConfig

ATTENTION: Final = "piecework"


def adapt_paged(config: ModelConfig, hf_config: PretrainedConfig, *, dtype: torch.dtype) -> AdaptedModel:
    """Return transformers' model, unchanged but for those three interfaces; parameters and caches in `dtype`.

    Raises UnsupportedModelError where its attention isn't reached by them, or does what `piecework::attention` can't.
    """
    register_interfaces()
    try:
        with meta_parameters(), no_init_weights():
            module: Any = AutoModelForCausalLM.from_config(hf_config, attn_implementation=TRIAL, dtype=dtype)
    except KeyError:  # its classes are looked up by that name
        module = build_by_name(hf_config, dtype=dtype, masks=ATTENTION)
    notes = fixed_frequencies(module, longest=config.max_positions)
    keep_states(module)
    direct = direct_parts(module)
    length = config.max_positions if direct else 0
    redirect(direct, try_attention)
    states = give_states(module.eval(), cache_length=length)
    redirect(direct, paged_attention)
    if direct:
        module.config._attn_implementation = ATTENTION
    else:
        module.set_attn_implementation(ATTENTION)
    return AdaptedModel(module, states, checkpoint_sources(module), notes, cache_length=length)


def register_interfaces() -> None:
    """Tell transformers of attention by piecework, under the name `ATTENTION`."""
    for name, function in ((ATTENTION, paged_attention), (TRIAL, try_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sight)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sight | Tensor | None,
    scaling: float | None = None,
    *,
    batch: ForwardBatch,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    key_bias: Tensor | None = None,
    **_ignored: object,
) -> tuple[Tensor, None]:
    """Serve as transformers' attention function: query [1, H, T, D], key/value [1, K, T, D] -> [1, T, H, D].

    Of the module only the `kv_cache` is read, so that nothing tells sibling layers apart.
    """
    if not isinstance(attention_mask, Sight):
        raise unreached(module, UNKNOWN_MASK)
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
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        attention_mask.window,
        softcap or 0.0,
        s_aux,
        attention_mask.chunk,
        key_bias,
    )
    return out.unsqueeze(0), None
