"""What mixers with recurrent states share: a batch's sequences with their state slots, and the causal convolution.

A sequence's state lives in one slot, from its first token to its last. A slot that another sequence had before holds
what that one left: where a sequence has no token before this forward, its state counts as zero, whatever is there.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu

from piecework.errors import OpError
from piecework.ops.ir.forward_context import Batch
from piecework.ops.ir.layer import LayerNameType, resolve


@dataclass(frozen=True)
class DecodeSequences:
    """The leading sequences with one new token each; a forward's first D tokens.

    Attributes:
        num: D.
        slots: [D] int64.
        fresh: [D] bool, whether the token is the sequence's first.
    """

    num: int
    slots: Tensor
    fresh: Tensor

    def read(self, states: Tensor) -> Tensor:
        """Copy the sequences' states [D, ...] out of their slots [N, ...], in float32."""
        found = states.index_select(0, self.slots).float()
        return found.masked_fill_(self.fresh.view(-1, *[1] * (found.dim() - 1)), 0.0)

    def write(self, states: Tensor, new: Tensor) -> None:
        """Put the sequences' new states [D, ...] into their slots [N, ...]."""
        states.index_copy_(0, self.slots, new.to(states.dtype))


@dataclass(frozen=True)
class PrefillChunk:
    """Consecutive new tokens of one sequence: where they are in the forward, its slot, whether it starts here."""

    tokens: slice
    slot: int
    fresh: bool

    def read(self, states: Tensor) -> Tensor:
        """Copy the sequence's state out of its slot, in float32."""
        state = states[self.slot]
        return torch.zeros_like(state, dtype=torch.float32) if self.fresh else state.float()


def decode_sequences(batch: Batch) -> DecodeSequences | None:
    """Return the sequences that are handled together, or None where there are none. Nothing waits for the device."""
    num = batch.num_decode_tokens
    slots = _slots(batch)[:num]
    return DecodeSequences(num, slots, batch.seq_lens[:num] == 1) if num else None


def prefill_chunks(batch: Batch, *, num_tokens: int) -> list[PrefillChunk]:
    """Return the other sequences, those without a new token left out. Waits for the device where there are some."""
    if batch.num_decode_tokens == num_tokens:
        return []
    starts, lengths, slots = batch.query_start.tolist(), batch.seq_lens.tolist(), _slots(batch).tolist()
    return [
        PrefillChunk(slice(start, stop), slots[i], fresh=lengths[i] == stop - start)
        for i, (start, stop) in enumerate(itertools.pairwise(starts))
        if i >= batch.num_decode_tokens and stop > start
    ]


def causal_conv(
    x: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    decode: DecodeSequences | None,
    chunks: list[PrefillChunk],
) -> Tensor:
    """Convolve each channel over its sequence's tokens, this one and those before, and apply SiLU.

    Args:
        x: [T, C].
        weight: [C, K], the last tap is the token's own.
        bias: [C] or None.
        conv_state: [N, C, K - 1], the last K - 1 inputs of the sequence in each slot; written in place.
        decode: the sequences with one token each.
        chunks: the others.

    Returns:
        [T, C], dtype of x.
    """
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    if decode is not None:
        window = torch.cat([decode.read(conv_state), x[: decode.num].float().unsqueeze(-1)], dim=-1)
        decode.write(conv_state, window[..., 1:])
        mixed = (window * weight.float()).sum(-1)
        out[: decode.num] = silu(mixed if bias is None else mixed + bias.float()).to(x.dtype)
    for chunk in chunks:
        new = x[chunk.tokens].t()
        inputs = torch.cat([chunk.read(conv_state).to(x.dtype), new], dim=-1)
        conv_state[chunk.slot] = inputs[:, new.shape[1] :].to(conv_state.dtype)
        mixed = conv1d(inputs.unsqueeze(0), weight.unsqueeze(1), bias, groups=x.shape[1])
        out[chunk.tokens] = silu(mixed.squeeze(0).t())
    return out


def check_size(layer: LayerNameType, *, what: str, given: int, found: int) -> None:
    """Raise OpError where an operator was told another size than the layer's state has."""
    if given != found:
        raise OpError(asked=f"run layer {resolve(layer)!r} with {what} = {given}", found=f"a state of {found}")


def _slots(batch: Batch) -> Tensor:
    if batch.state_slots is None:
        raise OpError(
            asked="run a mixer with a recurrent state",
            found="a batch without state_slots",
            try_="Batch(..., state_slots=slots), the slot of each sequence",
        )
    return batch.state_slots
