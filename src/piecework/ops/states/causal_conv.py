"""`piecework::causal_conv`: a convolution of each channel over its sequence's tokens, with a window that is kept.

Shape suffixes: T tokens, C channels, K taps, N slots.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from piecework.ops.ir.opaque_op import opaque_op
from piecework.ops.ir.values import flattened
from piecework.ops.recurrent import DecodeSequences, StateSequences, check_shapes, decode_sequences, prefill_chunks

CAUSAL_CONV_OP: Final = "piecework::causal_conv"


@opaque_op(CAUSAL_CONV_OP, mutates=("conv_state",))
@flattened
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, sequences: StateSequences
) -> Tensor:
    """Convolve each channel over its sequence's tokens, those of this step and the K - 1 before.

    Args:
        x: [T, C], any strides.
        weight: [C, K], the last tap is the token's own.
        bias: [C] or None.
        conv_state: [N, C, K - 1], the last K - 1 inputs of the sequence in each slot; written in place.
        sequences: whose the tokens are.

    Returns:
        [T, C], contiguous, dtype of x.
    """
    return convolve(x, weight, bias, conv_state, sequences)


@causal_conv.fake
@flattened
def _causal_conv_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, sequences: StateSequences
) -> Tensor:
    (_, channels), taps = x.shape, weight.shape[-1]
    own = () if bias is None else ((bias, (channels,)),)
    state = (conv_state, (conv_state.shape[0], channels, taps - 1))
    check_shapes(CAUSAL_CONV_OP, sequences, (weight, (channels, taps)), state, *own)
    return x.new_empty(x.shape)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, sequences: StateSequences) -> Tensor:
    """Do what the operator does."""
    decode = decode_sequences(sequences)
    if decode is not None and decode.num == x.shape[0]:
        return _step(x, weight, bias, conv_state=conv_state, decode=decode)
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    if decode is not None:
        out[: decode.num] = _step(x[: decode.num], weight, bias, conv_state=conv_state, decode=decode)
    for chunk in prefill_chunks(sequences, num_tokens=x.shape[0]):
        new = x[chunk.tokens].t()
        inputs = torch.cat([chunk.read(conv_state).to(x.dtype), new], dim=-1)
        conv_state[chunk.slot] = inputs[:, new.shape[1] :].to(conv_state.dtype)
        mixed = conv1d(inputs.unsqueeze(0), weight.unsqueeze(1), bias, groups=x.shape[1])
        out[chunk.tokens] = mixed.squeeze(0).t()
    return out


def _step(x: Tensor, weight: Tensor, bias: Tensor | None, *, conv_state: Tensor, decode: DecodeSequences) -> Tensor:
    """Convolve one token of each of D sequences, [D, C]; `conv_state` is written."""
    window = torch.cat([decode.read(conv_state), x.float().unsqueeze(-1)], dim=-1)
    decode.write(conv_state, window[..., 1:])
    mixed = (window * weight.float()).sum(-1)
    return (mixed if bias is None else mixed + bias.float()).to(x.dtype)
