"""Batches for measuring and checking a language model's forward, and its inputs as the engine makes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from piecework.models.batch import BLOCK_SIZE

Inputs = dict[str, Tensor | int]


@dataclass(frozen=True)
class Batch:
    """Sequences that decode, and prompts.

    Args:
        decode: sequences with one new token each.
        decode_context: tokens that each of those has in the cache.
        prompts: sequences with `prompt_tokens` new tokens each.
        prompt_tokens: new tokens of each prompt.
        prompt_context: tokens that each prompt has in the cache.
    """

    decode: int = 0
    decode_context: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    prompt_context: int = 0

    @property
    def regime(self) -> str:
        """One of "decode", "prefill" and "mixed", by which sequences there are."""
        if not self.prompts:
            return "decode"
        return "mixed" if self.decode else "prefill"

    @property
    def context(self) -> int:
        """What the sequences that there are have in the cache; those that decode, where there are both."""
        return self.decode_context if self.decode else self.prompt_context

    @property
    def num_seqs(self) -> int:
        """How many sequences."""
        return self.decode + self.prompts

    @property
    def num_tokens(self) -> int:
        """How many new tokens."""
        return self.decode + self.prompts * self.prompt_tokens

    @property
    def num_blocks(self) -> int:
        """The blocks of the cache that all sequences have together."""
        return sum(-(-sum(sequence) // BLOCK_SIZE) for sequence in self.sequences())

    def sequences(self) -> list[tuple[int, int]]:
        """Return (tokens in the cache, new tokens) of each sequence, those that decode first."""
        decode = [(self.decode_context, 1)] * self.decode
        return decode + [(self.prompt_context, self.prompt_tokens)] * self.prompts

    def __str__(self) -> str:
        parts = []
        if self.decode:
            parts.append(f"{self.decode} decode tokens after {self.decode_context} each")
        if self.prompts:
            parts.append(f"{self.prompts} × {self.prompt_tokens} prompt tokens after {self.prompt_context} each")
        return ", ".join(parts)


def batch_inputs(batch: Batch, *, scattered: bool = False) -> Inputs:
    """Return a forward's inputs, all int64; logits are those of each sequence's last token.

    Blocks lie one after the other, or `scattered` over the cache, always in the same way.
    """
    sequences = batch.sequences()
    starts = torch.tensor([start for start, _ in sequences])
    counts = torch.tensor([count for _, count in sequences])
    seq_lens = starts + counts
    query_start = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    widths = -(-seq_lens // BLOCK_SIZE)
    order = torch.arange(batch.num_blocks)
    if scattered:
        order = torch.randperm(batch.num_blocks, generator=torch.Generator().manual_seed(0))
    tables = torch.zeros(len(sequences), int(widths.max()), dtype=torch.int64)
    for row, own in zip(tables, order.split(widths.tolist()), strict=True):
        row[: len(own)] = own
    rows = torch.arange(len(sequences)).repeat_interleave(counts)
    positions = torch.arange(batch.num_tokens) + (starts - query_start[:-1]).repeat_interleave(counts)
    return {
        "input_ids": torch.arange(batch.num_tokens) % 256,
        "positions": positions,
        "slot_mapping": tables[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
        "block_tables": tables,
        "seq_lens": seq_lens,
        "query_start": query_start,
        "logits_indices": query_start[1:] - 1,
        "state_slots": torch.arange(len(sequences)),
        "num_decode_tokens": batch.decode,
        "num_prefill_tokens": batch.num_tokens - batch.decode,
    }
