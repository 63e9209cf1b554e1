"""`piecework::mamba2_mixer`: the core of a Mamba2 layer, between its input and output projections.

Convolution, selective scan and gated norm of Mamba2 (Dao and Gu 2024, arXiv:2405.21060). One token per sequence is one
step of the recurrence, all sequences together; a prompt is scanned in chunks, each as matrix products (the paper's
section 6), with the state handed from chunk to chunk and from forward to forward.

Shape suffixes: T tokens, L tokens of a chunk, H heads, P head dim, G groups of heads that share B and C, N state size,
C = H * P + 2 * G * N convolved channels, K taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from piecework.ops.ir.forward_context import layer_state, running_context
from piecework.ops.ir.layer import LayerNameType
from piecework.ops.ir.opaque_op import opaque_op
from piecework.ops.recurrent import DecodeSequences, causal_conv, check_size, decode_sequences, prefill_chunks


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
    chunk_size: int = 128


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
    batch = running_context().batch
    decode, chunks = decode_sequences(batch), prefill_chunks(batch, num_tokens=projected.shape[0])
    _, num_heads, head_dim, state_size = state.ssm_state.shape
    check_size(layer, what="inner_size", given=inner_size, found=num_heads * head_dim)
    gate, convolved, dt = projected.split([inner_size, weights.conv_weight.shape[0], num_heads], dim=-1)
    convolved = causal_conv(
        convolved,
        weight=weights.conv_weight,
        bias=weights.conv_bias,
        conv_state=state.conv_state,
        decode=decode,
        chunks=chunks,
    )
    x, b, c = convolved.float().tensor_split([inner_size, (inner_size + convolved.shape[1]) // 2], dim=-1)
    num_groups = b.shape[1] // state_size
    x = x.unflatten(-1, (num_groups, -1, head_dim))
    b, c = b.unflatten(-1, (num_groups, state_size)), c.unflatten(-1, (num_groups, state_size))
    dt = softplus(dt.float() + weights.dt_bias.float()).clamp(*weights.time_step_limit)
    log_decay = (dt * -weights.a_log.float().exp()).unflatten(-1, (num_groups, -1))
    scaled = x * dt.unflatten(-1, (num_groups, -1)).unsqueeze(-1)
    scanned = torch.zeros_like(x)
    if decode is not None:
        one = slice(decode.num)
        scanned[one] = _step(scaled[one], log_decay[one], b[one], c[one], state=state.ssm_state, decode=decode)
    for chunk in chunks:
        carried = chunk.read(state.ssm_state).unflatten(0, (num_groups, -1))
        for start in range(chunk.tokens.start, chunk.tokens.stop, weights.chunk_size):
            part = slice(start, min(start + weights.chunk_size, chunk.tokens.stop))
            scanned[part], carried = _scan(scaled[part], log_decay[part], b[part], c[part], state=carried)
        state.ssm_state[chunk.slot] = carried.flatten(0, 1).to(state.ssm_state.dtype)
    mixed = scanned + x * weights.d.float().view(num_groups, -1, 1)
    return _gated_norm(mixed.flatten(1), gate, weights).to(projected.dtype)


@mamba2_mixer.fake
def _mamba2_mixer_fake(projected: Tensor, layer: LayerNameType, inner_size: int) -> Tensor:
    return projected.new_empty(projected.shape[0], inner_size)


def _step(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, *, state: Tensor, decode: DecodeSequences) -> Tensor:
    """Advance each of D sequences by one token; `state` [slots, H, P, N] is written.

    x [D, G, H/G, P] times its time step, log_decay [D, G, H/G], b and c [D, G, N] -> [D, G, H/G, P].
    """
    new = decode.read(state).unflatten(1, x.shape[1:3]).mul_(log_decay.exp()[..., None, None])
    new.addcmul_(x.unsqueeze(-1), b[:, :, None, None, :])
    decode.write(state, new.flatten(1, 2))
    return torch.matmul(new.flatten(2, 3), c.unsqueeze(-1)).view(x.shape)


def _scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """Scan one chunk of one sequence: token j reaches token i >= j with the decay of the steps between them.

    x [L, G, H/G, P] times its time step, log_decay [L, G, H/G], b and c [L, G, N], state [G, H/G, P, N] ->
    result [L, G, H/G, P] and the state after the chunk.
    """
    b, c = b.transpose(0, 1), c.transpose(0, 1)
    total = log_decay.cumsum(0)
    by_head = total.permute(1, 2, 0)
    between = by_head.unsqueeze(-1) - by_head.unsqueeze(-2)
    later = torch.ones(between.shape[-2:], dtype=torch.bool, device=x.device).triu_(1)
    reach = between.masked_fill_(later, float("-inf")).exp_().mul_(torch.matmul(c, b.transpose(1, 2)).unsqueeze(1))
    # all heads of a group share b and c, so that their states are one matrix
    out = torch.matmul(c, state.flatten(1, 2).transpose(1, 2)).transpose(0, 1).view(x.shape)
    out = out * total.exp().unsqueeze(-1) + torch.matmul(reach, x.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)
    left = (x * (total[-1] - total).exp().unsqueeze(-1)).flatten(2).permute(1, 2, 0)
    state = state * total[-1].exp()[..., None, None] + torch.matmul(left, b).view(state.shape)
    return out, state


def _gated_norm(x: Tensor, gate: Tensor, weights: Mamba2Weights) -> Tensor:
    """Multiply [T, H * P] by the gate's SiLU, then RMS norm in groups of channels; float32 until the weight."""
    gated = (x * silu(gate.float())).unflatten(-1, (-1, weights.norm_group_size or x.shape[-1]))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + weights.norm_eps)
    result: Tensor = weights.norm_weight * normed.flatten(1).to(gate.dtype)
    return result
