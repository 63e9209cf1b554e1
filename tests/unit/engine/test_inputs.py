"""The forward's inputs of a scheduled batch."""

from __future__ import annotations

import torch
from torch import Tensor

from piecework.engine.inputs import build_inputs
from piecework.engine.request import GenerationRequest, SamplingParams, Sequence
from piecework.engine.scheduler import ScheduledBatch, ScheduledSequence


def make_sequence(tokens: list[int], blocks: list[int]) -> Sequence:
    sequence = Sequence(GenerationRequest(0, tuple(tokens), SamplingParams()), max_length=100)
    sequence.blocks = blocks
    return sequence


def test_a_mixed_batch() -> None:
    decoding, chunk = make_sequence([10, 11, 12], [5, 9, 1]), make_sequence([20, 21, 22, 23, 24, 25], [3, 7, 8])
    batch = ScheduledBatch((ScheduledSequence(decoding, 2, 1), ScheduledSequence(chunk, 3, 2)), num_decode=1)
    inputs = build_inputs(batch, block_size=4)
    lists = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    assert lists == {
        "input_ids": [12, 23, 24],
        "positions": [2, 3, 4],
        "slot_mapping": [5 * 4 + 2, 3 * 4 + 3, 7 * 4 + 0],
        "block_tables": [[5, 9], [3, 7]],
        "seq_lens": [3, 5],
        "query_start": [0, 1, 3],
        "logits_indices": [0, 2],
        "num_decode_tokens": 1,
    }
    assert all(value.dtype == torch.int64 for value in inputs.values() if isinstance(value, Tensor))


def test_short_rows_are_padded_with_a_block_of_their_own() -> None:
    short, long = make_sequence([1], [6]), make_sequence(list(range(9)), [3, 7, 8])
    batch = ScheduledBatch((ScheduledSequence(short, 0, 1), ScheduledSequence(long, 0, 9)), num_decode=0)
    tables = build_inputs(batch, block_size=4)["block_tables"]
    assert isinstance(tables, Tensor)
    assert tables.tolist() == [[6, 6, 6], [3, 7, 8]]
