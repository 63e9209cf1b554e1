"""`piecework::gated_delta_net`: the core of a gated delta net layer, between its projections and its gated norm.

Convolution and gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464), as in Qwen3-Next. The state maps
keys to values; each token lets it fade, then corrects what it holds for the token's key. One token per sequence is one
such step, all sequences together. A prompt goes in chunks, whose corrections are found together by a triangular solve
(Yang et al. 2024, arXiv:2406.06484), with the state handed from chunk to chunk and from forward to forward.

Shape suffixes: T tokens, L tokens of a chunk, Hk key heads, Hv value heads, each key head serving Hv / Hk consecutive
ones, Dk and Dv their sizes, C = 2 * Hk * Dk + Hv * Dv convolved channels, K taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from piecework.ops.ir.forward_context import layer_state, running_context
from piecework.ops.ir.layer import LayerNameType
from piecework.ops.ir.opaque_op import opaque_op
from piecework.ops.recurrent import DecodeSequences, causal_conv, check_size, decode_sequences, prefill_chunks

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
    chunk_size: int = 64


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
    batch = running_context().batch
    decode, chunks = decode_sequences(batch), prefill_chunks(batch, num_tokens=mixed_qkv.shape[0])
    _, num_heads, key_dim, value_dim = state.recurrent_state.shape
    check_size(layer, what="head_dim", given=head_dim, found=value_dim)
    convolved = causal_conv(
        mixed_qkv,
        weight=weights.conv_weight,
        bias=weights.conv_bias,
        conv_state=state.conv_state,
        decode=decode,
        chunks=chunks,
    )
    values = num_heads * value_dim
    qk, v = convolved.float().split([convolved.shape[1] - values, values], dim=-1)
    q, k = qk.unflatten(-1, (2, -1, key_dim)).unbind(1)
    shared = num_heads // q.shape[1]
    q = (_unit(q) * key_dim**-0.5).repeat_interleave(shared, dim=1)
    k = _unit(k).repeat_interleave(shared, dim=1)
    v = v.unflatten(-1, (num_heads, value_dim))
    beta = b.float().sigmoid()
    log_decay = -weights.a_log.float().exp() * softplus(a.float() + weights.dt_bias.float())
    tokens = _Tokens(q, k, v, beta, log_decay)
    out = torch.zeros_like(v, memory_format=torch.contiguous_format)
    if decode is not None:
        one = slice(decode.num)
        out[one] = _step(tokens.part(one), state=state.recurrent_state, decode=decode)
    for chunk in chunks:
        carried = chunk.read(state.recurrent_state)
        for start in range(chunk.tokens.start, chunk.tokens.stop, weights.chunk_size):
            part = slice(start, min(start + weights.chunk_size, chunk.tokens.stop))
            out[part], carried = _chunk(tokens.part(part), state=carried)
        state.recurrent_state[chunk.slot] = carried.to(state.recurrent_state.dtype)
    return out.to(mixed_qkv.dtype)


@gated_delta_net.fake
def _gated_delta_net_fake(mixed_qkv: Tensor, b: Tensor, a: Tensor, layer: LayerNameType, head_dim: int) -> Tensor:
    return mixed_qkv.new_empty(*b.shape, head_dim)


@dataclass(frozen=True)
class _Tokens:
    """Some tokens, all in float32: q, k [T, Hv, Dk], v [T, Hv, Dv], beta and log_decay [T, Hv]."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor

    def part(self, which: slice) -> _Tokens:
        """Return some of the tokens."""
        return _Tokens(self.q[which], self.k[which], self.v[which], self.beta[which], self.log_decay[which])


def _step(tokens: _Tokens, *, state: Tensor, decode: DecodeSequences) -> Tensor:
    """Advance each of D sequences by one token, [D, Hv, Dv]; `state` [slots, Hv, Dk, Dv] is written."""
    new = decode.read(state).mul_(tokens.log_decay.exp()[..., None, None])
    held = torch.matmul(tokens.k.unsqueeze(-2), new).squeeze(-2)
    correction = (tokens.v - held) * tokens.beta.unsqueeze(-1)
    new.addcmul_(tokens.k.unsqueeze(-1), correction.unsqueeze(-2))
    decode.write(state, new)
    return torch.matmul(tokens.q.unsqueeze(-2), new).squeeze(-2)


def _chunk(tokens: _Tokens, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """Go through L tokens of one sequence: result [L, Hv, Dv] and the state [Hv, Dk, Dv] after them.

    Token i's correction depends on those of the tokens before it: u_i = beta_i (v_i - decay(0, i) k_i S -
    sum over j < i of decay(j, i) (k_i k_j) u_j), a unit lower triangular system with a row per token.
    """
    q, k, v = (t.transpose(0, 1) for t in (tokens.q, tokens.k, tokens.v))
    beta, total = tokens.beta.t().unsqueeze(-1), tokens.log_decay.t().cumsum(-1)
    between = total.unsqueeze(-1) - total.unsqueeze(-2)
    later = torch.ones(between.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
    decay = between.masked_fill_(later, float("-inf")).exp_()
    since_start = total.exp().unsqueeze(-1)
    system = (torch.matmul(k, k.transpose(-1, -2)) * decay * beta).tril_(-1)
    wanted = beta * (v - since_start * torch.matmul(k, state))
    corrections = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    out = since_start * torch.matmul(q, state) + torch.matmul(torch.matmul(q, k.transpose(-1, -2)) * decay, corrections)
    left = (total[:, -1:] - total).exp().unsqueeze(-1)
    state = state * since_start[:, -1:] + torch.matmul((k * left).transpose(-1, -2), corrections)
    return out.transpose(0, 1), state


def _unit(x: Tensor) -> Tensor:
    """Scale the last dimension to length one."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS)
