"""The scheduler: budgets hold, decoding comes first, the order is that of arrival, everyone ends, nothing leaks."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from piecework.engine.block_pool import BlockPool
from piecework.engine.request import FinishReason, GenerationRequest, Sequence
from piecework.engine.sampling_params import SamplingParams
from piecework.engine.scheduler import ScheduledBatch, Scheduler
from piecework.errors import CapacityError, InternalError

BLOCK_SIZE = 4


def make_sequence(request_id: int, prompt: list[int] | int, num_new: int, *, scored: bool = False) -> Sequence:
    tokens = tuple(range(100 * request_id, 100 * request_id + prompt)) if isinstance(prompt, int) else tuple(prompt)
    params = SamplingParams(max_tokens=num_new, prompt_logprobs=0 if scored else None)
    return Sequence(GenerationRequest(str(request_id), tokens, params), 0, max_length=len(tokens) + num_new)


def number(sequence: Sequence) -> int:
    return int(sequence.request.request_id)


def complete(batch: ScheduledBatch, scheduler: Scheduler) -> list[Sequence]:
    """Do what the engine does after a step: a next token for everyone who is computed. Returns those who ended."""
    scheduler.advance(batch)
    ended = []
    for sequence, start, num_new in batch.items:
        sequence.num_scored = max(sequence.num_scored, min(start + num_new, sequence.num_prompt - 1))
        if not sequence.num_uncomputed:
            sequence.append(len(sequence.tokens) % 3)
            if sequence.finish_reason is not None:
                scheduler.finish(sequence)
                ended.append(sequence)
    return ended


def make_scheduler(num_blocks: int, *, max_tokens: int = 8, max_seqs: int = 8) -> Scheduler:
    return Scheduler(BlockPool(num_blocks), block_size=BLOCK_SIZE, max_tokens=max_tokens, max_seqs=max_seqs)


def numbers(batch: ScheduledBatch) -> list[tuple[int, int, int]]:
    return [(number(sequence), start, num_new) for sequence, start, num_new in batch.items]


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, steps are taken, requests are aborted and caches are lost, in any order.

    The machine keeps what is written in each slot: a token and all before it, as real states depend on them.
    """

    @initialize(
        num_blocks=st.integers(6, 16),
        max_tokens=st.integers(1, 24),
        max_seqs=st.integers(1, 5),
        prefix_caching=st.booleans(),
    )
    def start(self, num_blocks: int, max_tokens: int, max_seqs: int, prefix_caching: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.max_tokens, self.max_seqs = max_tokens, max_seqs
        self.scheduler = Scheduler(
            self.pool, block_size=BLOCK_SIZE, max_tokens=max_tokens, max_seqs=max_seqs, prefix_caching=prefix_caching
        )
        self.slots: dict[int, tuple[int, ...]] = {}
        self.live: list[Sequence] = []
        self.started: list[int] = []
        self.num_added = 0

    # few different tokens, so that prompts share beginnings
    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=15),
        num_new=st.integers(1, 9),
        scored=st.booleans(),
    )
    def add(self, prompt: list[int], num_new: int, scored: bool) -> None:
        sequence = make_sequence(self.num_added, prompt, num_new, scored=scored)
        self.scheduler.add(sequence)
        self.live.append(sequence)
        self.num_added += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.finish(self.live.pop(data.draw(st.integers(0, len(self.live) - 1))))

    @rule()
    def lose_the_cache(self) -> None:
        self.scheduler.preempt_all()
        self.slots.clear()
        assert self.pool.num_free == self.pool.num_blocks

    @precondition(lambda self: self.live)
    @rule()
    def step(self) -> None:
        before = {sequence: list(sequence.tokens) for sequence in self.live}
        running = {sequence for sequence in self.live if sequence.blocks}
        batch = self.scheduler.schedule()
        self.check_budgets(batch, running)
        self.check_order(batch)
        self.write(batch)
        ended = complete(batch, self.scheduler)
        for sequence, tokens in before.items():
            assert sequence.tokens[: len(tokens)] == tokens, "a token was lost or changed"
        for sequence in ended:
            assert sequence.finish_reason is FinishReason.LENGTH
            assert len(sequence.tokens) == sequence.max_length
            self.live.remove(sequence)

    def check_budgets(self, batch: ScheduledBatch, running: set[Sequence]) -> None:
        assert batch.items
        assert len(batch.items) <= self.max_seqs
        assert sum(item.num_new for item in batch.items) <= self.max_tokens
        for index, (sequence, start, num_new) in enumerate(batch.items):
            assert start == sequence.num_computed
            assert 1 <= num_new <= sequence.num_uncomputed
            assert start + num_new <= len(sequence.blocks) * BLOCK_SIZE
            if index < batch.num_decode:
                assert sequence.num_uncomputed == 1
        rest = batch.items[batch.num_decode :]
        for sequence, _, _ in rest:
            assert sequence.num_uncomputed > 1 or sequence not in running, "decoding, but not among the first"
        assert all(item.num_new == item.sequence.num_uncomputed for item in rest[:-1]), "two are partly computed"

    def check_order(self, batch: ScheduledBatch) -> None:
        order = [number(item.sequence) for item in batch.items]
        assert order == sorted(order)
        holding = [number(sequence) for sequence in self.live if sequence.blocks]
        waiting = [number(sequence) for sequence in self.live if not sequence.blocks]
        assert max(holding, default=-1) < min(waiting, default=self.num_added), "somebody was overtaken"
        assert order[0] == min(number(sequence) for sequence in self.live), "the first in the line doesn't run"
        assert all(not sequence.blocks for sequence in batch.preempted)

    def write(self, batch: ScheduledBatch) -> None:
        written = set()
        for sequence, start, num_new in batch.items:
            for position in range(start, start + num_new):
                slot = sequence.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                assert slot not in written
                written.add(slot)
                self.slots[slot] = tuple(sequence.tokens[: position + 1])
        for sequence, start, num_new in batch.items:
            for position in range(start + num_new):
                slot = sequence.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                assert self.slots[slot] == tuple(sequence.tokens[: position + 1]), "wrong contents"

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        held = [block for sequence in self.live for block in sequence.blocks]
        for sequence in self.live:
            assert len(set(sequence.blocks)) == len(sequence.blocks)
        for block in range(self.pool.num_blocks):
            assert self.pool.num_references(block) == held.count(block)
        assert self.pool.num_free == self.pool.num_blocks - len(set(held))
        assert self.scheduler.has_work is bool(self.live)
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)

    def teardown(self) -> None:
        for _ in range(3000):
            if not getattr(self, "live", None):
                break
            self.step()
        else:
            raise AssertionError("somebody never ends")
        if hasattr(self, "pool"):
            assert self.pool.num_free == self.pool.num_blocks


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase


def test_prompts_are_chunked_to_the_budget() -> None:
    scheduler = make_scheduler(10, max_tokens=4)
    scheduler.add(make_sequence(0, 10, 1))
    chunks = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        chunks += [(start, num_new) for _, start, num_new in batch.items]
        complete(batch, scheduler)
    assert chunks == [(0, 4), (4, 4), (8, 2)]


def test_a_new_prompt_joins_the_batch_after_those_who_decode() -> None:
    scheduler = make_scheduler(10)
    scheduler.add(make_sequence(0, 3, 4))
    complete(scheduler.schedule(), scheduler)
    scheduler.add(make_sequence(1, 5, 4))
    scheduler.add(make_sequence(2, 5, 4))
    batch = scheduler.schedule()
    assert numbers(batch) == [(0, 3, 1), (1, 0, 5), (2, 0, 2)]
    assert batch.num_decode == 1
    complete(batch, scheduler)
    batch = scheduler.schedule()
    assert numbers(batch) == [(0, 4, 1), (1, 5, 1), (2, 2, 3)]
    assert batch.num_decode == 2


def test_the_last_token_of_a_prompt_counts_as_decoding() -> None:
    scheduler = make_scheduler(10, max_tokens=4)
    scheduler.add(make_sequence(0, 5, 2))
    complete(scheduler.schedule(), scheduler)
    assert scheduler.schedule().num_decode == 1


def test_admission_looks_at_the_prompt_and_not_at_the_whole_length() -> None:
    scheduler = make_scheduler(4, max_tokens=16)
    scheduler.add(make_sequence(0, 3, 9))
    scheduler.add(make_sequence(1, 3, 9))
    assert len(scheduler.schedule().items) == 2
    assert scheduler.num_waiting == 0


def test_the_last_who_came_is_preempted_and_comes_back() -> None:
    scheduler = make_scheduler(4, max_tokens=16)
    scheduler.add(make_sequence(0, 4, 9))
    scheduler.add(make_sequence(1, 4, 9))
    seen = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        seen += [(number(sequence), len(sequence.tokens)) for sequence in batch.preempted]
        if batch.preempted:
            assert scheduler.num_waiting == 1
        complete(batch, scheduler)
    assert seen == [(1, 9)]
    assert scheduler.counts.preemptions == 1


def test_one_who_lacks_a_block_stands_still_while_others_go_on() -> None:
    scheduler = make_scheduler(3, max_tokens=16)
    scheduler.add(make_sequence(0, 4, 4))
    scheduler.add(make_sequence(1, 4, 4))
    complete(scheduler.schedule(), scheduler)
    assert numbers(scheduler.schedule()) == [(0, 4, 1)]
    assert scheduler.num_running == 2


def test_sequences_beyond_the_batch_wait() -> None:
    scheduler = make_scheduler(10, max_tokens=2, max_seqs=5)
    for i in range(3):
        scheduler.add(make_sequence(i, 1, 3))
    order = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        order.append([number(item.sequence) for item in batch.items])
        complete(batch, scheduler)
    assert order == [[0, 1], [0, 1], [0, 1], [2], [2], [2]]


def run_alone(scheduler: Scheduler, sequence: Sequence) -> list[tuple[int, int, int]]:
    scheduler.add(sequence)
    batch = scheduler.schedule()
    found = numbers(batch)
    while True:
        complete(batch, scheduler)
        if not scheduler.has_work:
            return found
        batch = scheduler.schedule()


@pytest.mark.parametrize(("length", "computed"), [(12, 4), (13, 1), (14, 2), (15, 3), (16, 4)])
def test_a_prompt_that_is_cached_leaves_at_least_one_token(length: int, computed: int) -> None:
    scheduler = make_scheduler(10, max_tokens=64)
    tokens = list(range(16))
    run_alone(scheduler, make_sequence(0, tokens, 2))
    again = make_sequence(1, tokens[:length], 2)
    assert run_alone(scheduler, again) == [(1, length - computed, computed)]
    assert again.num_cached == length - computed
    assert scheduler.counts.cached_tokens == length - computed


def test_generated_tokens_are_found_too() -> None:
    scheduler = make_scheduler(10, max_tokens=64)
    first = make_sequence(0, 5, 8)
    run_alone(scheduler, first)
    assert run_alone(scheduler, make_sequence(1, first.tokens, 1)) == [(1, 12, 1)]  # the last one is not computed


def test_equal_prompts_of_one_batch_share_blocks() -> None:
    scheduler = make_scheduler(10, max_tokens=64)
    scheduler.add(make_sequence(0, list(range(9)), 2))
    scheduler.add(make_sequence(1, list(range(9)), 2))
    batch = scheduler.schedule()
    assert numbers(batch) == [(0, 0, 9), (1, 8, 1)]
    assert batch.items[0].sequence.blocks[:2] == batch.items[1].sequence.blocks[:2]


def test_a_prompt_whose_own_logits_are_wanted_is_computed() -> None:
    scheduler = make_scheduler(10, max_tokens=64)
    run_alone(scheduler, make_sequence(0, list(range(9)), 2))
    assert run_alone(scheduler, make_sequence(1, list(range(9)), 2, scored=True)) == [(1, 0, 9)]


def test_without_prefix_caching_nothing_is_found() -> None:
    scheduler = Scheduler(BlockPool(10), block_size=4, max_tokens=64, max_seqs=4, prefix_caching=False)
    for request_id in range(2):
        assert run_alone(scheduler, make_sequence(request_id, list(range(9)), 2)) == [(request_id, 0, 9)]


def test_what_can_never_fit_is_refused() -> None:
    scheduler = make_scheduler(2)
    scheduler.add(make_sequence(0, 6, 3))  # the last token needs no slot
    with pytest.raises(CapacityError, match="has 2 blocks"):
        scheduler.add(make_sequence(1, 6, 4))


def test_blocks_held_by_others_are_a_bug() -> None:
    pool = BlockPool(2)
    pool.allocate(2)
    scheduler = Scheduler(pool, block_size=BLOCK_SIZE, max_tokens=8, max_seqs=8)
    scheduler.add(make_sequence(0, 6, 2))
    with pytest.raises(InternalError, match="1 waiting"):
        scheduler.schedule()


def test_scheduler_and_pool_need_no_torch() -> None:
    code = "import sys, piecework.engine.scheduler; raise SystemExit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
