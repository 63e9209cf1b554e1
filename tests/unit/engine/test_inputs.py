"""The forward's inputs of a scheduled batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from piecework.engine.inputs import ForwardInputs, InputBuilder
from piecework.engine.request import GenerationRequest, Sequence
from piecework.engine.sampling_params import SamplingParams
from piecework.engine.scheduler import ScheduledBatch, ScheduledSequence


def make_sequence(tokens: list[int], blocks: list[int], *, generated: int = 0, scored: bool = False) -> Sequence:
    params = SamplingParams(prompt_logprobs=1 if scored else None)
    prompt = tokens[: len(tokens) - generated]
    sequence = Sequence(GenerationRequest("a", tuple(prompt), params), 0, max_length=100)
    for token in tokens[len(prompt) :]:
        sequence.append(token)
    sequence.blocks = blocks
    return sequence


def make_builder() -> InputBuilder:
    return InputBuilder(block_size=4, max_seqs=3, max_length=32)


def lists(forward: ForwardInputs) -> dict[str, Any]:
    for value in forward.tensors.values():
        assert isinstance(value, int) or (value.dtype == torch.int64 and value.is_contiguous())
    return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in forward.tensors.items()}


def test_a_mixed_batch() -> None:
    decoding, chunk = make_sequence([10, 11, 12], [5, 9, 1]), make_sequence([20, 21, 22, 23, 24, 25], [3, 7, 8])
    batch = ScheduledBatch((ScheduledSequence(decoding, 2, 1), ScheduledSequence(chunk, 3, 2)), num_decode=1)
    forward = make_builder().build(batch)
    assert lists(forward) == {
        "input_ids": [12, 23, 24],
        "positions": [2, 3, 4],
        "slot_mapping": [5 * 4 + 2, 3 * 4 + 3, 7 * 4 + 0],
        "block_tables": [[5, 9], [3, 7]],
        "seq_lens": [3, 5],
        "query_start": [0, 1, 3],
        "logits_indices": [0],
        "state_slots": [0, 1],
        "num_decode_tokens": 1,
        "num_prefill_tokens": 2,
    }
    assert forward.sampled == (decoding,)
    assert not forward.scored


def test_decoding_only() -> None:
    a, b = make_sequence([1, 2, 3, 4, 5], [2, 0], generated=2), make_sequence([6], [1])
    batch = ScheduledBatch((ScheduledSequence(a, 4, 1), ScheduledSequence(b, 0, 1)), num_decode=2)
    forward = make_builder().build(batch)
    found = lists(forward)
    assert found["input_ids"] == [5, 6]
    assert found["positions"] == [4, 0]
    assert found["slot_mapping"] == [0, 4]
    assert found["seq_lens"] == [5, 1]
    assert found["query_start"] == [0, 1, 2]
    assert found["logits_indices"] == [0, 1]
    assert forward.sampled == (a, b)


def test_a_batch_of_one_chunk_has_a_row_of_logits_for_nobody() -> None:
    batch = ScheduledBatch((ScheduledSequence(make_sequence(list(range(9)), [3]), 0, 4),), num_decode=0)
    forward = make_builder().build(batch)
    assert lists(forward)["logits_indices"] == [3]
    assert forward.sampled == ()


def test_tables_follow_sequences_that_grow_and_go() -> None:
    builder = make_builder()
    a, b = make_sequence(list(range(12)), [6]), make_sequence(list(range(12)), [3])

    def tables() -> list[list[int]]:
        items = tuple(ScheduledSequence(s, 4 * len(s.blocks) - 1, 1) for s in (a, b))
        return lists(builder.build(ScheduledBatch(items, num_decode=2)))["block_tables"]

    assert tables() == [[6], [3]]
    a.blocks.append(7)
    b.blocks += [8, 9]
    found = tables()
    assert [found[0][:2], found[1]] == [[6, 7], [3, 8, 9]]
    builder.release(a)
    builder.release(a)
    a.blocks = [1]
    found = tables()
    assert [found[0][:1], found[1]] == [[1], [3, 8, 9]]


def test_logits_of_a_prompts_own_tokens() -> None:
    builder = make_builder()
    a = make_sequence([20, 21, 22, 23, 24, 25], [0, 1], scored=True)
    b = make_sequence([9, 8], [2])
    first = builder.build(ScheduledBatch((ScheduledSequence(b, 1, 1), ScheduledSequence(a, 0, 4)), num_decode=1))
    assert lists(first)["logits_indices"] == [0, 1, 2, 3, 4]
    assert first.sampled == (b,)
    assert [(s.sequence, s.first, s.num_rows, s.row) for s in first.scored] == [(a, 0, 4, 1)]
    a.num_computed = a.num_scored = 4
    second = builder.build(ScheduledBatch((ScheduledSequence(a, 4, 2),), num_decode=0))
    assert lists(second)["logits_indices"] == [1, 0]
    assert second.sampled == (a,)
    assert [(s.first, s.num_rows, s.row) for s in second.scored] == [(4, 1, 1)]
    # computed again after a preemption: what was scored is not scored twice
    a.num_computed = 0
    again = builder.build(ScheduledBatch((ScheduledSequence(a, 0, 6),), num_decode=0))
    assert [(s.first, s.num_rows) for s in again.scored] == [(4, 1)]
