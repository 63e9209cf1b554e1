"""What operators with recurrent states share: a batch's sequences with their state slots.

A sequence's state lives in one slot, from its first token to its last. A slot that another sequence had before holds
what that one left: where a sequence has no token before this forward, its state counts as zero, whatever is there.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from piecework.errors import OpError
from piecework.ops.ir.forward_context import Batch, running_context
from piecework.ops.ir.layer import LayerNameType, resolve


class StateSequences(NamedTuple):
    """S sequences whose new tokens are grouped by sequence; those that decode, with one new token each, come first.

    Attributes:
        seq_lens: [S] int64, tokens of each sequence after this step.
        query_start: [S + 1] int64, prefix sums of the new tokens per sequence.
        num_decode_tokens: how many of the first sequences decode; also how many of the first tokens are theirs.
        state_slots: [S] int64, the slot of each sequence, of which no two share one.
    """

    seq_lens: Tensor
    query_start: Tensor
    num_decode_tokens: int
    state_slots: Tensor


@dataclass(frozen=True)
class DecodeSequences:
    """The leading sequences with one new token each; a forward's first D tokens.

    Attributes:
        num: D.
        slots: [D] int64.
        fresh: [D] bool, whether the token is the sequence's first; None where no token is known to be.
        first: the first slot, where the others are known to follow one another.
    """

    num: int
    slots: Tensor
    fresh: Tensor | None
    first: int | None

    def read(self, states: Tensor) -> Tensor:
        """Return the sequences' states [D, ...] from their slots [N, ...], in float32, to be changed and written."""
        if self.first is None or states.dtype is not torch.float32:
            found = states.index_select(0, self.slots).float()
        else:
            found = states[self.first : self.first + self.num]
        if self.fresh is not None:
            found.masked_fill_(self.fresh.view(-1, *[1] * (found.dim() - 1)), 0.0)
        return found

    def write(self, states: Tensor, new: Tensor) -> None:
        """Put the sequences' new states [D, ...] into their slots [N, ...], unless they are what `read` changed."""
        if self.first is None or new.data_ptr() != states[self.first].data_ptr():
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


def decode_sequences(sequences: StateSequences) -> DecodeSequences | None:
    """Return the sequences that are handled together, or None where there are none. Nothing waits for the device."""
    lens, _, num, slots = sequences
    if num == 0:
        return None
    lens, slots = lens[:num], slots[:num]
    if lens.device.type != "cpu":
        return DecodeSequences(num, slots, lens == 1, None)
    numbers = slots.tolist()
    first = numbers[0] if numbers == [*range(numbers[0], numbers[0] + num)] else None
    return DecodeSequences(num, slots, lens == 1 if 1 in lens.tolist() else None, first)


def prefill_chunks(sequences: StateSequences, *, num_tokens: int) -> list[PrefillChunk]:
    """Return the other sequences, those without a new token left out. Waits for the device where there are some."""
    num = sequences.num_decode_tokens
    if num == num_tokens:
        return []
    starts, lengths = sequences.query_start.tolist(), sequences.seq_lens.tolist()
    slots = sequences.state_slots.tolist()
    return [
        PrefillChunk(slice(start, stop), slots[i], fresh=lengths[i] == stop - start)
        for i, (start, stop) in enumerate(itertools.pairwise(starts))
        if i >= num and stop > start
    ]


def running_sequences() -> StateSequences:
    """Return those of the running forward context's batch. Raises OpError without one, or without state_slots."""
    batch: Batch = running_context().batch
    if batch.state_slots is None:
        raise OpError(
            asked="run a mixer with a recurrent state",
            found="a batch without state_slots",
            try_="Batch(..., state_slots=slots), the slot of each sequence",
        )
    return StateSequences(batch.seq_lens, batch.query_start, batch.num_decode_tokens, batch.state_slots)


def check_shapes(op: str, sequences: StateSequences, *given: tuple[Tensor, tuple[object, ...]]) -> None:
    """Raise OpError where tensors don't have the shapes beside them, or sequences aren't such, in a trace of `op`.

    Sizes that a trace doesn't know as numbers are taken to be right.
    """
    lens, starts, _, slots = sequences
    if any(t.dim() != 1 or t.dtype is not torch.int64 for t in (lens, starts, slots)):
        raise OpError(asked=f"trace {op}", found="sequences that aren't vectors of int64", try_="as it is documented")
    for tensor, wanted in ((slots, (lens.shape[0],)), *given):
        found = tuple(tensor.shape)
        known = [(a, b) for a, b in zip(found, wanted, strict=False) if isinstance(a, int) and isinstance(b, int)]
        if len(found) != len(wanted) or any(a != b for a, b in known):
            raise OpError(
                asked=f"trace {op}",
                found=f"a tensor {list(found)} in place of {list(wanted)}",
                try_="as it is documented",
            )


def check_groups(op: str, heads: int, groups: int) -> None:
    """Raise OpError where heads can't be in so many groups of the same size."""
    if groups < 1 or heads % groups:
        raise OpError(asked=f"trace {op}", found=f"{heads} heads in {groups} groups", try_="as it is documented")


def check_size(layer: LayerNameType, *, what: str, given: int, found: int) -> None:
    """Raise OpError where an operator was told another size than the layer's state has."""
    if given != found:
        raise OpError(asked=f"run layer {resolve(layer)!r} with {what} = {given}", found=f"a state of {found}")
