"""`piecework::mamba2_mixer`: the core of a Mamba2 layer, between its input and output projections.

Convolution (ops/states/causal_conv.py), selective scan (ops/states/mamba2_scan.py) and gated norm of Mamba2.

Shape suffixes as in ops/states/mamba2_scan.py, and C = H * P + 2 * G * N convolved channels, K taps.
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
from piecework.ops.states.mamba2_scan import CHUNK, scanned


@dataclass(frozen=True)
class Mamba2Weights:
    """A layer's parameters other than its projections.

    Attributes:
        conv_weight: [C, K].
        conv_bias: [C] or None.
        dt_bias: [H].
        a_log: [H], the logarithm of the decay rate.
        d: [H], the factor of the input that is added to the scan's result.
        norm_weight: [H * P].
        norm_eps: added to the mean square.
        norm_group_size: how many channels are normed together; None for all of them.
        time_step_limit: smallest and largest time step.
        chunk_size: tokens that are scanned together; changes speed and rounding only.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    a_log: Tensor
    d: Tensor
    norm_weight: Tensor
    norm_eps: float = 1e-5
    norm_group_size: int | None = None
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    chunk_size: int = CHUNK


@dataclass(frozen=True)
class Mamba2State:
    """What the forward context holds for a Mamba2 layer; the states are written in place.

    Attributes:
        weights: the layer's parameters.
        conv_state: [slots, C, K - 1], the last inputs of the convolution.
        ssm_state: [slots, H, P, N], float32 recommended.
    """

    weights: Mamba2Weights
    conv_state: Tensor
    ssm_state: Tensor


@opaque_op("piecework::mamba2_mixer")
def mamba2_mixer(projected: Tensor, layer: LayerNameType, inner_size: int) -> Tensor:
    """Mix tokens along their sequences.

    Args:
        projected: [T, H * P + C + H], the input projection's result: gate, convolved channels (x, B, C), time steps.
        layer: the layer whose `Mamba2State` is used.
        inner_size: H * P, which a trace can't ask the layer for.

    Returns:
        [T, inner_size], contiguous, dtype of `projected`, for the output projection. Scan and norm are in float32.

    Raises OpError outside of a forward context, where it has no such layer or one of another size, and for a batch
    without state_slots.
    """
    state = layer_state(layer, Mamba2State)
    weights = state.weights
    sequences = running_sequences()
    _, num_heads, head_dim, state_size = state.ssm_state.shape
    check_size(layer, what="inner_size", given=inner_size, found=num_heads * head_dim)
    gate, mixed, dt = projected.split([inner_size, weights.conv_weight.shape[0], num_heads], dim=-1)
    mixed = silu(convolve(mixed, weights.conv_weight, weights.conv_bias, state.conv_state, sequences))
    x, b, c = mixed.float().tensor_split([inner_size, (inner_size + mixed.shape[1]) // 2], dim=-1)
    x = x.unflatten(-1, (-1, head_dim))
    b, c = b.unflatten(-1, (-1, state_size)), c.unflatten(-1, (-1, state_size))
    dt = softplus(dt.float() + weights.dt_bias.float()).clamp(*weights.time_step_limit)
    log_decay = dt * -weights.a_log.float().exp()
    read = scanned(x * dt.unsqueeze(-1), log_decay, b, c, state.ssm_state, sequences, chunk_size=weights.chunk_size)
    out = read + x * weights.d.float().unsqueeze(-1)
    return _gated_norm(out.flatten(1), gate, weights).to(projected.dtype)


@mamba2_mixer.fake
def _mamba2_mixer_fake(projected: Tensor, layer: LayerNameType, inner_size: int) -> Tensor:
    return projected.new_empty(projected.shape[0], inner_size)


def _gated_norm(x: Tensor, gate: Tensor, weights: Mamba2Weights) -> Tensor:
    """Multiply [T, H * P] by the gate's SiLU, then RMS norm in groups of channels; float32 until the weight."""
    gated = (x * silu(gate.float())).unflatten(-1, (-1, weights.norm_group_size or x.shape[-1]))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + weights.norm_eps)
    result: Tensor = weights.norm_weight * normed.flatten(1).to(gate.dtype)
    return result
