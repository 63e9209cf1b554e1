"""`piecework::delta_rule`: the gated delta rule, whose state maps keys to values.

Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464. Each token lets the state fade, then corrects what it holds for the
token's key. One token per sequence is one such step, all sequences together. A prompt goes in chunks, whose corrections
are found together by a triangular solve (Yang et al. 2024, arXiv:2406.06484), with the state handed from chunk to chunk
and from forward to forward.

Shape suffixes: T tokens, L tokens of a chunk, Hk key heads, Hv value heads, each key head serving Hv / Hk consecutive
ones, Dk and Dv their sizes, N slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from piecework.ops.ir.opaque_op import opaque_op
from piecework.ops.ir.values import flattened
from piecework.ops.recurrent import (
    DecodeSequences,
    StateSequences,
    check_groups,
    check_shapes,
    decode_sequences,
    prefill_chunks,
)

DELTA_RULE_OP: Final = "piecework::delta_rule"
CHUNK: Final = 64
"""Tokens that are handled together; changes speed and rounding only."""


@opaque_op(DELTA_RULE_OP, mutates=("recurrent_state",))
@flattened
def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    recurrent_state: Tensor,
    sequences: StateSequences,
) -> Tensor:
    """Store what tokens say of their keys, and read what is held for their queries. Computed in float32.

    Args:
        query: [T, Hk, Dk], any strides, as are all of these.
        key: [T, Hk, Dk].
        value: [T, Hv, Dv].
        log_decay: [T, Hv], the logarithm of what the state fades by.
        beta: [T, Hv], how much of the difference is corrected.
        recurrent_state: [N, Hv, Dk, Dv], float32 recommended; written in place.
        sequences: whose the tokens are.

    Returns:
        [T, Hv, Dv], contiguous, dtype of `value`.
    """
    return corrected(query, key, value, log_decay, beta, recurrent_state, sequences)


@delta_rule.fake
@flattened
def _delta_rule_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    recurrent_state: Tensor,
    sequences: StateSequences,
) -> Tensor:
    (tokens, heads, value_dim), (_, key_heads, key_dim) = value.shape, key.shape
    keys = [(t, (tokens, key_heads, key_dim)) for t in (query, key)]
    strengths = [(t, (tokens, heads)) for t in (log_decay, beta)]
    state = (recurrent_state, (recurrent_state.shape[0], heads, key_dim, value_dim))
    check_shapes(DELTA_RULE_OP, sequences, *keys, *strengths, state)
    check_groups(DELTA_RULE_OP, heads, key_heads)
    return value.new_empty(value.shape)


def corrected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    recurrent_state: Tensor,
    sequences: StateSequences,
    *,
    chunk_size: int = CHUNK,
) -> Tensor:
    """Do what the operator does, `chunk_size` tokens of a prompt at a time."""
    shared = value.shape[1] // key.shape[1]
    q, k = (t.float().repeat_interleave(shared, dim=1) for t in (query, key))
    tokens = _Tokens(q, k, value.float(), beta.float(), log_decay.float())
    decode = decode_sequences(sequences)
    if decode is not None and decode.num == value.shape[0]:
        return _step(tokens, state=recurrent_state, decode=decode).to(value.dtype)
    out = torch.zeros_like(tokens.v, memory_format=torch.contiguous_format)
    if decode is not None:
        one = slice(decode.num)
        out[one] = _step(tokens.part(one), state=recurrent_state, decode=decode)
    for chunk in prefill_chunks(sequences, num_tokens=value.shape[0]):
        carried = chunk.read(recurrent_state)
        for start in range(chunk.tokens.start, chunk.tokens.stop, chunk_size):
            part = slice(start, min(start + chunk_size, chunk.tokens.stop))
            out[part], carried = _chunk(tokens.part(part), state=carried)
        recurrent_state[chunk.slot] = carried.to(recurrent_state.dtype)
    return out.to(value.dtype)


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
    rows = decode.read(state).mul_(tokens.log_decay.exp()[..., None, None])
    held = torch.matmul(tokens.k.unsqueeze(-2), rows).squeeze(-2)
    correction = (tokens.v - held) * tokens.beta.unsqueeze(-1)
    rows.addcmul_(tokens.k.unsqueeze(-1), correction.unsqueeze(-2))
    decode.write(state, rows)
    return torch.matmul(tokens.q.unsqueeze(-2), rows).squeeze(-2)


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
