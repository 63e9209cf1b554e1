"""What a forward's attention layers need to know of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from piecework.ops.mla.core import Regime

BLOCK_SIZE: Final = 16
"""Tokens per block of a paged cache."""
STATE_SLOTS: Final = "state_slots"
"""The size of states that have a slot for each sequence, and the input that says which."""


@dataclass(frozen=True)
class ForwardBatch:
    """A batch of sequences over a paged cache, the same object for every layer.

    Tokens are grouped by sequence; sequences that decode come first, with one new token each. Shape suffixes: T new
    tokens, S sequences, W blocks per row of the block table.

    Attributes:
        slot_mapping: [T] int64, block * block size + offset, where each new token's entry of the cache goes.
        block_tables: [S, W] int64, the blocks of each sequence, padded with any valid block.
        seq_lens: [S] int64, tokens of each sequence in the cache after this step.
        query_start: [S + 1] int64, prefix sums of the new tokens per sequence.
        num_decode_tokens: how many of the first sequences decode.
        num_prefill_tokens: T minus that.
        state_slots: [S] int64, the slot of each sequence in recurrent states; None in models without them.
        regime: what is known of the batch while a graph is traced: no prefill tokens (`DECODE`), no decode tokens
            (`PREFILL`), or nothing (`MIXED`), as which every batch may be run.
    """

    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start: Tensor
    num_decode_tokens: int
    num_prefill_tokens: int
    state_slots: Tensor | None = None
    regime: Regime = Regime.MIXED
