"""The scheduler: budgets hold, decoding comes first, everyone finishes, nothing leaks."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.engine.block_pool import BlockPool
from piecework.engine.request import FinishReason, GenerationRequest, SamplingParams, Sequence
from piecework.engine.scheduler import ScheduledBatch, Scheduler
from piecework.errors import CapacityError

BLOCK_SIZE = 4


def make_sequence(request_id: int, prompt_length: int, num_new: int) -> Sequence:
    params = SamplingParams(max_new_tokens=num_new)
    request = GenerationRequest(request_id, tuple(range(prompt_length)), params)
    return Sequence(request, max_length=prompt_length + num_new)


def complete(batch: ScheduledBatch, scheduler: Scheduler) -> None:
    """Do what the generator does after a step, with token 7 for everyone."""
    for item in batch.items:
        item.sequence.num_computed += item.num_new
        if not item.sequence.num_uncomputed:
            item.sequence.append(7, stop_token_ids=())
            if item.sequence.finish_reason is not None:
                scheduler.finish(item.sequence)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=6),
    max_tokens=st.integers(1, 24),
    max_seqs=st.integers(1, 4),
    num_blocks=st.integers(7, 20),
)
def test_every_sequence_finishes_within_all_budgets(
    shapes: list[tuple[int, int]], max_tokens: int, max_seqs: int, num_blocks: int
) -> None:
    pool = BlockPool(num_blocks)
    scheduler = Scheduler(pool, block_size=BLOCK_SIZE, max_tokens=max_tokens, max_seqs=max_seqs)
    sequences = [make_sequence(i, *shape) for i, shape in enumerate(shapes)]
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(1000):
        if not scheduler.has_work:
            break
        batch = scheduler.schedule()
        assert batch.items
        assert len(batch.items) <= max_seqs
        assert sum(item.num_new for item in batch.items) <= max_tokens
        held = [block for item in batch.items for block in item.sequence.blocks]
        assert len(set(held)) == len(held)
        for index, item in enumerate(batch.items):
            assert item.start == item.sequence.num_computed
            assert item.num_new >= 1
            assert item.start + item.num_new <= len(item.sequence.blocks) * BLOCK_SIZE
            assert item.sequence.is_decoding is (index < batch.num_decode)
            assert item.num_new == 1 or index >= batch.num_decode
        complete(batch, scheduler)
    assert not scheduler.has_work
    assert pool.num_free == num_blocks
    for sequence, (prompt_length, num_new) in zip(sequences, shapes, strict=True):
        assert len(sequence.tokens) == prompt_length + num_new
        assert sequence.finish_reason is FinishReason.LENGTH


def test_prompts_are_chunked_to_the_budget() -> None:
    scheduler = Scheduler(BlockPool(10), block_size=BLOCK_SIZE, max_tokens=4, max_seqs=8)
    scheduler.add(make_sequence(0, 10, 1))
    chunks = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        chunks += [(item.start, item.num_new) for item in batch.items]
        complete(batch, scheduler)
    assert chunks == [(0, 4), (4, 4), (8, 2)]


def test_a_new_prompt_joins_the_batch_of_decoding_sequences() -> None:
    scheduler = Scheduler(BlockPool(10), block_size=BLOCK_SIZE, max_tokens=8, max_seqs=8)
    scheduler.add(make_sequence(0, 3, 4))
    complete(scheduler.schedule(), scheduler)
    scheduler.add(make_sequence(1, 5, 4))
    batch = scheduler.schedule()
    assert [(item.sequence.request.request_id, item.num_new) for item in batch.items] == [(0, 1), (1, 5)]
    assert batch.num_decode == 1


def test_sequences_take_turns_when_the_batch_is_full() -> None:
    scheduler = Scheduler(BlockPool(10), block_size=BLOCK_SIZE, max_tokens=2, max_seqs=2)
    for i in range(3):
        scheduler.add(make_sequence(i, 1, 8))
    served = []
    for _ in range(9):
        batch = scheduler.schedule()
        served += [item.sequence.request.request_id for item in batch.items]
        complete(batch, scheduler)
    assert max(map(served.count, range(3))) - min(map(served.count, range(3))) <= 2


def test_what_can_never_fit_is_refused_and_what_cannot_now_waits() -> None:
    pool = BlockPool(2)
    scheduler = Scheduler(pool, block_size=BLOCK_SIZE, max_tokens=8, max_seqs=8)
    with pytest.raises(CapacityError, match="has 2 blocks"):
        scheduler.add(make_sequence(0, 6, 3))
    scheduler.add(make_sequence(1, 4, 2))
    scheduler.add(make_sequence(2, 4, 2))
    assert len(scheduler.schedule().items) == 1


def test_blocks_held_by_others_are_said_so() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    scheduler = Scheduler(pool, block_size=BLOCK_SIZE, max_tokens=8, max_seqs=8)
    scheduler.add(make_sequence(0, 6, 2))
    with pytest.raises(CapacityError, match="1 of 2"):
        scheduler.schedule()


def test_scheduler_and_pool_need_no_torch() -> None:
    code = "import sys, piecework.engine.scheduler; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
