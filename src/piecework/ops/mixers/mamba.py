"""`piecework::mamba_mixer`: the core of a Mamba layer, between its input and output projections.

Convolution (ops/states/causal_conv.py), the projections that make time steps and what is read and written of the
convolved channels, and the selective scan (ops/states/selective_scan.py).

Shape suffixes as in ops/states/selective_scan.py, and K taps, R the rank of time steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu, softplus

from piecework.ops.ir.forward_context import layer_state
from piecework.ops.ir.layer import LayerNameType
from piecework.ops.ir.opaque_op import opaque_op
from piecework.ops.recurrent import check_size, running_sequences
from piecework.ops.states.causal_conv import convolve
from piecework.ops.states.selective_scan import scanned


@dataclass(frozen=True)
class MambaWeights:
    """A layer's parameters other than its projections in and out.

    Attributes:
        conv_weight: [I, K].
        conv_bias: [I] or None.
        x_proj: [R + 2 * N, I].
        dt_proj: [I, R].
        dt_bias: [I].
        a_log: [I, N], the logarithm of the decay rate.
        d: [I], the factor of the input that is added to the scan's result.
        norms: weights [R], [N] and [N] of RMS norms of time steps, b and c (Jamba; ones for FalconMamba); None: none.
        norm_eps: added to their mean squares.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    a_log: Tensor
    d: Tensor
    norms: tuple[Tensor, Tensor, Tensor] | None = None
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class MambaState:
    """What the forward context holds for a Mamba layer; the states are written in place.

    Attributes:
        weights: the layer's parameters.
        conv_state: [slots, I, K - 1], the last inputs of the convolution.
        ssm_state: [slots, I, N], float32 recommended.
    """

    weights: MambaWeights
    conv_state: Tensor
    ssm_state: Tensor


@opaque_op("piecework::mamba_mixer")
def mamba_mixer(projected: Tensor, layer: LayerNameType, inner_size: int) -> Tensor:
    """Mix tokens along their sequences.

    Args:
        projected: [T, 2 * I], the input projection's result: channels, gate.
        layer: the layer whose `MambaState` is used.
        inner_size: I, which a trace can't ask the layer for.

    Returns:
        [T, I], contiguous, dtype of `projected`, for the output projection. The scan is in float32.

    Raises OpError outside of a forward context, where it has no such layer or one of another size, and for a batch
    without state_slots.
    """
    state = layer_state(layer, MambaState)
    weights = state.weights
    sequences = running_sequences()
    _, channels, state_size = state.ssm_state.shape
    check_size(layer, what="inner_size", given=inner_size, found=channels)
    x, gate = projected.split(channels, dim=-1)
    x = silu(convolve(x, weights.conv_weight, weights.conv_bias, state.conv_state, sequences))
    parts = linear(x, weights.x_proj).split([weights.dt_proj.shape[1], state_size, state_size], dim=-1)
    if weights.norms is not None:
        parts = tuple(
            _normed(part, weight, weights.norm_eps) for part, weight in zip(parts, weights.norms, strict=True)
        )
    steps, b, c = parts
    dt = softplus(linear(steps, weights.dt_proj).float() + weights.dt_bias.float())
    values = x.float()
    read = scanned(values * dt, dt, -weights.a_log.float().exp(), b, c, state.ssm_state, sequences)
    return ((read + values * weights.d.float()) * silu(gate.float())).to(projected.dtype)


@mamba_mixer.fake
def _mamba_mixer_fake(projected: Tensor, layer: LayerNameType, inner_size: int) -> Tensor:
    return projected.new_empty(projected.shape[0], inner_size)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of the last axis, in float32 until the weight."""
    wide = x.float()
    result: Tensor = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return result
