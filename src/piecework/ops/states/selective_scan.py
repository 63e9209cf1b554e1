"""`piecework::selective_scan`: the selective scan of Mamba, whose channels each have a state with decays of its own.

Gu and Dao 2023, arXiv:2312.00752. All sequences with one token take a step together; a prompt is scanned token by
token, with what doesn't depend on the state computed for many tokens at once.

Shape suffixes: T tokens, L tokens of a chunk, I channels, N state size.
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
    check_shapes,
    decode_sequences,
    prefill_chunks,
)

SELECTIVE_SCAN_OP: Final = "piecework::selective_scan"
_CHUNK: Final = 32


@opaque_op(SELECTIVE_SCAN_OP, mutates=("ssm_state",))
@flattened
def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, ssm_state: Tensor, sequences: StateSequences
) -> Tensor:
    """Let each channel's state fade, add each token's input to it, and read it. Computed in float32.

    Args:
        x: [T, I], inputs times their time steps; any strides, as are all of these.
        dt: [T, I], time steps.
        a: [I, N], by which the state fades in a unit of time: to exp(a).
        b: [T, N], where inputs go.
        c: [T, N], where results come from.
        ssm_state: [slots, I, N], float32 recommended; written in place.
        sequences: whose the tokens are.

    Returns:
        [T, I], contiguous, dtype of `x`.
    """
    return scanned(x, dt, a, b, c, ssm_state, sequences)


@selective_scan.fake
@flattened
def _selective_scan_fake(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, ssm_state: Tensor, sequences: StateSequences
) -> Tensor:
    (tokens, channels), size = x.shape, a.shape[-1]
    where = [(t, (tokens, size)) for t in (b, c)]
    state = (ssm_state, (ssm_state.shape[0], channels, size))
    check_shapes(SELECTIVE_SCAN_OP, sequences, (dt, (tokens, channels)), (a, (channels, size)), *where, state)
    return x.new_empty(x.shape)


def scanned(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, ssm_state: Tensor, sequences: StateSequences
) -> Tensor:
    """Do what the operator does."""
    dtype = x.dtype
    x, dt, a, b, c = (t.float() for t in (x, dt, a, b, c))
    decode = decode_sequences(sequences)
    if decode is not None and decode.num == x.shape[0]:
        return _step(x, dt, a, b, c, state=ssm_state, decode=decode).to(dtype)
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    if decode is not None:
        one = slice(decode.num)
        out[one] = _step(x[one], dt[one], a, b[one], c[one], state=ssm_state, decode=decode)
    for chunk in prefill_chunks(sequences, num_tokens=x.shape[0]):
        carried = chunk.read(ssm_state)
        for start in range(chunk.tokens.start, chunk.tokens.stop, _CHUNK):
            part = slice(start, min(start + _CHUNK, chunk.tokens.stop))
            out[part], carried = _scan(x[part], dt[part], a, b[part], c[part], state=carried)
        ssm_state[chunk.slot] = carried.to(ssm_state.dtype)
    return out.to(dtype)


def _step(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *, state: Tensor, decode: DecodeSequences) -> Tensor:
    """Advance each of D sequences by one token, [D, I]; `state` is written."""
    rows = decode.read(state).mul_((dt.unsqueeze(-1) * a).exp_()).addcmul_(x.unsqueeze(-1), b.unsqueeze(1))
    decode.write(state, rows)
    return torch.matmul(rows, c.unsqueeze(-1)).squeeze(-1)


def _scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *, state: Tensor) -> tuple[Tensor, Tensor]:
    """Go through L tokens of one sequence: result [L, I] and the state [I, N] after them."""
    decays = (dt.unsqueeze(-1) * a).exp_()
    states = x.unsqueeze(-1) * b.unsqueeze(1)
    for decay, after in zip(decays, states, strict=True):
        state = after.addcmul_(decay, state)
    return torch.matmul(states, c.unsqueeze(-1)).squeeze(-1), state
