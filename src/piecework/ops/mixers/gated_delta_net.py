"""`piecework::gated_delta_net`: the core of a gated delta net layer, between its projections and its gated norm.

Convolution (ops/states/causal_conv.py) and gated delta rule (ops/states/delta_rule.py), as in Qwen3-Next.

Shape suffixes as in ops/states/delta_rule.py, and C = 2 * Hk * Dk + Hv * Dv convolved channels, K taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from piecework.ops.ir.forward_context import layer_state
from piecework.ops.ir.layer import LayerNameType
from piecework.ops.ir.opaque_op import opaque_op
from piecework.ops.recurrent import check_size, running_sequences
from piecework.ops.states.causal_conv import convolve
from piecework.ops.states.delta_rule import CHUNK, corrected

_NORM_EPS = 1e-6


@dataclass(frozen=True)
class GatedDeltaNetWeights:
    """A layer's parameters other than its projections and its norm.

    Attributes:
        conv_weight: [C, K].
        conv_bias: [C] or None.
        dt_bias: [Hv].
        a_log: [Hv], the logarithm of the decay rate.
        chunk_size: tokens that are handled together; changes speed and rounding only.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    a_log: Tensor
    chunk_size: int = CHUNK


@dataclass(frozen=True)
class GatedDeltaNetState:
    """What the forward context holds for a gated delta net layer; the states are written in place.

    Attributes:
        weights: the layer's parameters.
        conv_state: [slots, C, K - 1], the last inputs of the convolution.
        recurrent_state: [slots, Hv, Dk, Dv], float32 recommended.
    """

    weights: GatedDeltaNetWeights
    conv_state: Tensor
    recurrent_state: Tensor


@opaque_op("piecework::gated_delta_net")
def gated_delta_net(mixed_qkv: Tensor, b: Tensor, a: Tensor, layer: LayerNameType, head_dim: int) -> Tensor:
    """Mix tokens along their sequences; queries and keys are normed to length one, queries scaled by Dk ** -0.5.

    Args:
        mixed_qkv: [T, C], the projected queries [Hk * Dk], keys [Hk * Dk] and values [Hv * Dv] side by side.
        b: [T, Hv], whose sigmoid says how much of a correction is made.
        a: [T, Hv], the time step from which the decay comes.
        layer: the layer whose `GatedDeltaNetState` is used.
        head_dim: Dv, which a trace can't ask the layer for.

    Returns:
        [T, Hv, Dv], contiguous, dtype of `mixed_qkv`; the recurrence is in float32.

    Raises OpError outside of a forward context, where it has no such layer or one of another size, and for a batch
    without state_slots.
    """
    state = layer_state(layer, GatedDeltaNetState)
    weights = state.weights
    sequences = running_sequences()
    _, num_heads, key_dim, value_dim = state.recurrent_state.shape
    check_size(layer, what="head_dim", given=head_dim, found=value_dim)
    convolved = convolve(mixed_qkv, weights.conv_weight, weights.conv_bias, state.conv_state, sequences)
    values = num_heads * value_dim
    qk, v = silu(convolved).float().split([convolved.shape[1] - values, values], dim=-1)
    q, k = qk.unflatten(-1, (2, -1, key_dim)).unbind(1)
    v = v.unflatten(-1, (num_heads, value_dim))
    log_decay = -weights.a_log.float().exp() * softplus(a.float() + weights.dt_bias.float())
    out = corrected(
        _unit(q) * key_dim**-0.5,
        _unit(k),
        v,
        log_decay,
        b.float().sigmoid(),
        state.recurrent_state,
        sequences,
        chunk_size=weights.chunk_size,
    )
    return out.to(mixed_qkv.dtype)


@gated_delta_net.fake
def _gated_delta_net_fake(mixed_qkv: Tensor, b: Tensor, a: Tensor, layer: LayerNameType, head_dim: int) -> Tensor:
    return mixed_qkv.new_empty(*b.shape, head_dim)


def _unit(x: Tensor) -> Tensor:
    """Scale the last dimension to length one."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS)
