"""`piecework::mamba2_scan`: the selective scan of Mamba2.

Dao and Gu 2024, arXiv:2405.21060. One token per sequence is one step of the recurrence, all sequences together; a
prompt is scanned in chunks, each as matrix products (the paper's section 6), with the state handed from chunk to chunk
and from forward to forward.

Shape suffixes: T tokens, L tokens of a chunk, H heads, P head dim, G groups of heads that share B and C, N state size.
"""

from __future__ import annotations

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

MAMBA2_SCAN_OP: Final = "piecework::mamba2_scan"
CHUNK: Final = 128
"""Tokens that are scanned together; changes speed and rounding only."""


@opaque_op(MAMBA2_SCAN_OP, mutates=("ssm_state",))
@flattened
def mamba2_scan(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, ssm_state: Tensor, sequences: StateSequences
) -> Tensor:
    """Let the state fade, add each token's input to it, and read it. Computed in float32.

    Args:
        x: [T, H, P], inputs times their time steps; any strides, as are all of these.
        log_decay: [T, H], the logarithm of what the state fades by.
        b: [T, G, N], where inputs go.
        c: [T, G, N], where results come from.
        ssm_state: [slots, H, P, N], float32 recommended; written in place.
        sequences: whose the tokens are.

    Returns:
        [T, H, P], contiguous, dtype of `x`.
    """
    return scanned(x, log_decay, b, c, ssm_state, sequences)


@mamba2_scan.fake
@flattened
def _mamba2_scan_fake(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, ssm_state: Tensor, sequences: StateSequences
) -> Tensor:
    (tokens, heads, head_dim), (_, groups, size) = x.shape, b.shape
    where = [(t, (tokens, groups, size)) for t in (b, c)]
    state = (ssm_state, (ssm_state.shape[0], heads, head_dim, size))
    check_shapes(MAMBA2_SCAN_OP, sequences, (log_decay, (tokens, heads)), *where, state)
    check_groups(MAMBA2_SCAN_OP, heads, groups)
    return x.new_empty(x.shape)


def scanned(
    x: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    ssm_state: Tensor,
    sequences: StateSequences,
    *,
    chunk_size: int = CHUNK,
) -> Tensor:
    """Do what the operator does, `chunk_size` tokens of a prompt at a time."""
    num_groups, dtype, shape = b.shape[1], x.dtype, x.shape
    x = x.float().unflatten(1, (num_groups, -1))
    log_decay = log_decay.float().unflatten(1, (num_groups, -1))
    b, c = b.float(), c.float()
    decode = decode_sequences(sequences)
    if decode is not None and decode.num == x.shape[0]:
        return _step(x, log_decay, b, c, state=ssm_state, decode=decode).view(shape).to(dtype)
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    if decode is not None:
        one = slice(decode.num)
        out[one] = _step(x[one], log_decay[one], b[one], c[one], state=ssm_state, decode=decode)
    for chunk in prefill_chunks(sequences, num_tokens=x.shape[0]):
        carried = chunk.read(ssm_state).unflatten(0, (num_groups, -1))
        for start in range(chunk.tokens.start, chunk.tokens.stop, chunk_size):
            part = slice(start, min(start + chunk_size, chunk.tokens.stop))
            out[part], carried = _scan(x[part], log_decay[part], b[part], c[part], state=carried)
        ssm_state[chunk.slot] = carried.flatten(0, 1).to(ssm_state.dtype)
    return out.view(shape).to(dtype)


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
