"""Put transformers' DeepSeek-V2 and -V3 on latent attention and on routed experts.

transformers caches expanded keys and values, or latents without absorbed projections; neither can be paged here. So its
decoder layers are replaced by layers of the same parameters, around `MultiHeadLatentAttention` and `RoutedExperts`; the
rest (embedding, dense MLPs, norms, logits) is its own. What layers of multi-token prediction a checkpoint has is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from piecework.bundle.recipes import Source, Sources
from piecework.capture.request import TensorInput
from piecework.models.adapted import AdaptedModel
from piecework.models.batch import BLOCK_SIZE, ForwardBatch
from piecework.models.latent_attention import (
    LATENT_CACHE,
    LatentOptions,
    LatentRotary,
    MultiHeadLatentAttention,
    latent_sources,
)
from piecework.models.paged_attention import ATTENTION, register_interfaces
from piecework.models.routed_experts import RoutedExperts, expert_sources
from piecework.spec.config import ModelConfig
from piecework.spec.model_spec import ModelSpec


def adapt_deepseek(spec: ModelSpec, hf_config: PretrainedConfig) -> AdaptedModel:
    """Return transformers' model with our decoder layers; routers are float32 whatever the spec's dtype.

    Args:
        spec: of a model with latent attention.
        hf_config: transformers' reading of its config.
    """
    config, dtype = spec.config, getattr(torch, spec.dtype)
    # its attention is replaced; but with one of its own, transformers would make a mask
    register_interfaces()
    with torch.device("meta"), no_init_weights():
        module: nn.Module = AutoModelForCausalLM.from_config(hf_config, attn_implementation=ATTENTION, dtype=dtype)
    model = cast("Any", module.model)
    rotary = type(model.rotary_emb)(config=hf_config)  # again, because its frequencies are computed here
    model.rotary_emb = PositionEmbedding(LatentRotary(rotary.inv_freq, scaling=rotary.attention_scaling))
    first = model.layers[0].self_attn
    options = LatentOptions(
        scale=first.scaling,
        eps=first.kv_a_layernorm.variance_epsilon,
        bias=first.kv_a_proj_with_mqa.bias is not None,
        interleaved=bool(getattr(hf_config, "rope_interleave", True)),
        mla=spec.mla,
        kv_cache_dtype=spec.kv_cache_dtype,
    )
    with torch.device("meta"):
        model.layers = nn.ModuleList(_decoder_layer(layer, config, options, dtype=dtype) for layer in model.layers)
    caches = latent_caches(module, dtype=dtype)
    return AdaptedModel(module, caches, weight_sources(module), decisions(module))


@final
class PositionEmbedding(nn.Module):
    """Takes the place of transformers' rotary embedding in the model's forward."""

    def __init__(self, rotary: LatentRotary) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, _hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `LatentRotary` does of positions [1, T]."""
        cos, sin = self.rotary(position_ids.squeeze(0))
        return cos, sin


@final
class DecoderLayer(nn.Module):
    """Latent attention, then an MLP or experts, both after a norm and added to what came in.

    Args:
        attention: the one.
        mlp: the other, [T, X] -> [T, X] for the hidden size X.
        norms: of what goes into each.
    """

    def __init__(self, attention: nn.Module, mlp: nn.Module, *, norms: tuple[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm, self.post_attention_layernorm = norms

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        batch: ForwardBatch,
        **_ignored: object,
    ) -> Tensor:
        """Return the next layer's hidden states, [1, T, X] as they came."""
        hidden = hidden_states.squeeze(0)
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), *position_embeddings, batch)
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        out: Tensor = hidden.unsqueeze(0)
        return out


def latent_caches(module: nn.Module, *, dtype: torch.dtype) -> dict[str, TensorInput]:
    """Return the latent caches of a model's layers, whose weights are of `dtype`, by qualified name, as states."""
    states = {}
    for name, part in module.named_modules():
        if isinstance(part, MultiHeadLatentAttention):
            qualified = f"{name}.{LATENT_CACHE}"
            width, cached = part.cache_entry(dtype)
            states[qualified] = TensorInput(
                qualified, ("blocks", BLOCK_SIZE, width), str(cached).removeprefix("torch.")
            )
    return states


def weight_sources(module: nn.Module) -> Sources:
    """Say how those weights of a model are made that a checkpoint has in another form."""
    sources: dict[str, Source] = {}
    for name, part in module.named_modules():
        made: Mapping[str, Source] = {}
        if isinstance(part, MultiHeadLatentAttention):
            made = latent_sources(part, name=name)
        elif isinstance(part, RoutedExperts):
            made = expert_sources(part.experts, name=f"{name}.experts")
        sources.update(made)
    return sources


def decisions(module: nn.Module) -> tuple[str, ...]:
    """Return what was decided for a model's layers, a note each."""
    layers = (part for part in module.modules() if isinstance(part, MultiHeadLatentAttention))
    return tuple(dict.fromkeys(note for layer in layers for note in layer.decisions()))


def _decoder_layer(layer: Any, config: ModelConfig, options: LatentOptions, *, dtype: torch.dtype) -> DecoderLayer:
    """Return what takes the place of a transformers' decoder layer, made of its parts and of new ones."""
    assert config.latent is not None
    hidden_size, heads = layer.hidden_size, layer.self_attn.num_heads
    attention = MultiHeadLatentAttention(hidden_size, heads, sizes=config.latent, options=options)
    mlp = layer.mlp
    if hasattr(mlp, "experts"):
        assert config.experts is not None
        mlp = RoutedExperts(config.experts, hidden_size=hidden_size, shared=mlp.shared_experts)
        mlp.experts.to(dtype)
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return DecoderLayer(attention.to(dtype), mlp, norms=norms)
