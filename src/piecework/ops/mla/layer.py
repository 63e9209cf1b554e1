"""`piecework::layer_mla_attention`: latent attention that finds its cache and weights by the layer's name.

The state under the name has what `mla_attention` (ops/mla/attention.py) is given besides the tokens; shape suffixes as
in ops/mla/core.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from piecework.ops.ir.forward_context import Batch, layer_state, running_context
from piecework.ops.ir.layer import LayerNameType
from piecework.ops.ir.opaque_op import opaque_op
from piecework.ops.mla.attention import mla_attention
from piecework.ops.mla.core import LatentWeights, NewLatents
from piecework.ops.recurrent import check_size
from piecework.ops.sequences import Sequences


@dataclass(frozen=True)
class LatentState:
    """What the forward context holds for a layer with latent attention; the cache is written in place.

    Attributes:
        norm_weight: [L], of the RMS norm of latents.
        norm_eps: of that norm.
        weights: what expands latents, `w_uv` included.
        latent_cache: [blocks, B, E], allocated with zeros.
    """

    norm_weight: Tensor
    norm_eps: float
    weights: LatentWeights
    latent_cache: Tensor


@opaque_op("piecework::layer_mla_attention")
def layer_mla_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    compressed: Tensor,
    cos: Tensor,
    sin: Tensor,
    layer: LayerNameType,
    scale: float,
    value_size: int,
) -> Tensor:
    """Store the new tokens' latents in the layer's cache, and attend over it.

    Args:
        q_nope: [T, H, N].
        q_pe: [T, H, R], rotated, halves apart.
        compressed: [T, L + R], latents before their norm, and keys before their rotation.
        cos: [T, R / 2], of each token's position.
        sin: [T, R / 2].
        layer: the layer whose `LatentState` is used.
        scale: factor of the scores before the softmax.
        value_size: V, which a trace can't ask the layer for.

    Returns:
        [T, H * V], contiguous, dtype of the queries.

    Raises OpError outside of a forward context, and where it has no such layer or one of another size.
    """
    state = layer_state(layer, LatentState)
    assert state.weights.w_uv is not None
    check_size(layer, what="value_size", given=value_size, found=state.weights.w_uv.shape[2])
    batch: Batch = running_context().batch
    new = NewLatents(compressed, state.norm_weight, state.norm_eps, cos, sin, state.latent_cache, batch.slot_mapping)
    sequences = Sequences(batch.block_tables, batch.seq_lens, batch.query_start, batch.num_decode_tokens)
    result: Tensor = mla_attention.function(q_nope, q_pe, *new, *sequences, scale, *state.weights)
    return result


@layer_mla_attention.fake
def _layer_mla_attention_fake(
    q_nope: Tensor,
    q_pe: Tensor,
    compressed: Tensor,
    cos: Tensor,
    sin: Tensor,
    layer: LayerNameType,
    scale: float,
    value_size: int,
) -> Tensor:
    return q_nope.new_empty(q_nope.shape[0], q_nope.shape[1] * value_size)
