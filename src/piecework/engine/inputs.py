"""A scheduled batch as the tensors of a model's forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy
import torch
from torch import Tensor

from piecework.engine.request import Sequence
from piecework.engine.scheduler import ScheduledBatch, ScheduledSequence
from piecework.models.batch import STATE_SLOTS


@dataclass(frozen=True)
class ScoredChunk:
    """Logits of a prompt's own tokens: those after `first` to `first + num_rows`, counted from 0.

    Attributes:
        sequence: whose prompt.
        first: the first token that has been read; its logits say what comes after it.
        num_rows: how many logits.
        row: the first of them among the forward's logits.
    """

    sequence: Sequence
    first: int
    num_rows: int
    row: int


@dataclass(frozen=True)
class ForwardInputs:
    """The forward's named inputs, and whose logits it will return.

    Attributes:
        tensors: see `models/adapter.py`; all tensors are int64, on the host.
        sampled: the sequences that get a next token, in the order of the first logits.
        scored: prompts whose own tokens' logits come after those.
    """

    tensors: dict[str, Tensor | int]
    sampled: tuple[Sequence, ...]
    scored: tuple[ScoredChunk, ...]


@final
class InputBuilder:
    """Builds inputs step by step. Keeps the block tables of sequences between steps, and adds only what is new.

    The place of a sequence in these is also its slot in recurrent states.

    Args:
        block_size: tokens per block.
        max_seqs: most sequences that have blocks at the same time.
        max_length: most tokens of a sequence.
    """

    def __init__(self, *, block_size: int, max_seqs: int, max_length: int) -> None:
        self._block_size = block_size
        # rows[i] is the table of the sequence in place i; entries that it doesn't have name any valid block
        self._tables = numpy.zeros((max_seqs, -(-max_length // block_size)), dtype=numpy.int64)
        self._vacant = list(range(max_seqs - 1, -1, -1))
        self._places: dict[Sequence, int] = {}
        self._num_known = [0] * max_seqs

    def build(self, batch: ScheduledBatch) -> ForwardInputs:
        """Return the inputs of a batch, whose sequences hold the blocks for it.

        Logits are wanted of the last token of every sequence that is computed completely, and of prompts as asked;
        where no sequence wants any, of the last token of all, because a forward returns at least one.
        """
        size = self._block_size
        places, token_ids, sampled, last = [], [], [], []
        for sequence, start, num_new in batch.items:
            places.append(self._place(sequence))
            if num_new == 1:
                token_ids.append(sequence.tokens[start])
            else:
                token_ids += sequence.tokens[start : start + num_new]
            if start + num_new == len(sequence.tokens):
                sampled.append(sequence)
                last.append(len(token_ids) - 1)
        rows = numpy.array(places)
        starts = numpy.array([item.start for item in batch.items])
        seq_lens, query_start, positions, row_of_token = starts + 1, numpy.arange(len(rows) + 1), starts, rows
        if len(token_ids) != len(rows):
            counts = numpy.array([item.num_new for item in batch.items])
            seq_lens = starts + counts
            numpy.cumsum(counts, out=query_start[1:])
            row_of_token = rows.repeat(counts)
            positions = numpy.arange(len(token_ids)) + (starts - query_start[:-1]).repeat(counts)
        blocks = self._tables[row_of_token, positions // size]
        width = -(-int(seq_lens.max()) // size)
        scored = _scored(batch.items, query_start, num_sampled=len(last))
        for chunk, query in scored:
            last += range(query, query + chunk.num_rows)
        tensors: dict[str, Tensor | int] = {
            "input_ids": torch.tensor(token_ids),
            "positions": torch.from_numpy(positions),
            "slot_mapping": torch.from_numpy(blocks * size + positions % size),
            "block_tables": torch.from_numpy(self._tables[:, :width].take(rows, axis=0)),
            "seq_lens": torch.from_numpy(seq_lens),
            "query_start": torch.from_numpy(query_start),
            "logits_indices": torch.tensor(last or [len(token_ids) - 1]),
            STATE_SLOTS: torch.from_numpy(rows),
            "num_decode_tokens": batch.num_decode,
            "num_prefill_tokens": len(token_ids) - batch.num_decode,
        }
        return ForwardInputs(tensors, tuple(sampled), tuple(chunk for chunk, _ in scored))

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that lost its blocks."""
        place = self._places.pop(sequence, None)
        if place is not None:
            self._num_known[place] = 0
            self._vacant.append(place)

    def _place(self, sequence: Sequence) -> int:
        """Return the row of a sequence in the tables, with all of its blocks."""
        place = self._places.get(sequence)
        if place is None:
            place = self._places[sequence] = self._vacant.pop()
        known, blocks = self._num_known[place], sequence.blocks
        if len(blocks) != known:
            self._tables[place, known : len(blocks)] = blocks[known:]
            self._num_known[place] = len(blocks)
        return place


def _scored(
    items: tuple[ScheduledSequence, ...], query_start: numpy.ndarray, *, num_sampled: int
) -> list[tuple[ScoredChunk, int]]:
    """Return the chunks of prompts whose logits are wanted, each with its first place among the new tokens."""
    chunks = []
    row = num_sampled
    for index, (sequence, start, num_new) in enumerate(items):
        if sequence.num_computed < sequence.num_prompt and sequence.wants_prompt_logits:
            first = max(start, sequence.num_scored)
            num_rows = min(start + num_new, sequence.num_prompt - 1) - first
            if num_rows > 0:
                query = int(query_start[index]) + first - start
                chunks.append((ScoredChunk(sequence, first, num_rows, row), query))
                row += num_rows
    return chunks
