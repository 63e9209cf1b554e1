"""Which sequences run in the next step, and how many tokens of each. Works without torch.

Sequences run first come, first served. Those that run and those that wait make up one line in the order of arrival:
those who decode, then at most one whose prompt is partly computed, then those who wait. A step takes one token of
everyone who decodes; what remains of the token budget goes to prompts, in chunks where it must.

A sequence is admitted when the pool has blocks for the tokens that it has now, not for all it may grow to. When blocks
run out, the last who came is preempted: it gives its blocks back, keeps its tokens, and waits at the head of the line
to be computed again. The first in the line can have the blocks of all others, so it always ends, and then the next.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple, final

from piecework.engine.block_pool import FIRST_PARENT, BlockPool, block_digest, num_blocks_for
from piecework.engine.request import Sequence
from piecework.errors import CapacityError, InternalError


class ScheduledSequence(NamedTuple):
    """The tokens [start, start + num_new) of a sequence."""

    sequence: Sequence
    start: int
    num_new: int


@dataclass(frozen=True)
class ScheduledBatch:
    """What runs in one step.

    Attributes:
        items: sequences with their new tokens, in the order of arrival.
        num_decode: how many of the first items compute the only token they have left to compute.
        preempted: sequences that lost their blocks.
    """

    items: tuple[ScheduledSequence, ...]
    num_decode: int
    preempted: tuple[Sequence, ...] = ()


@dataclass
class SchedulerCounts:
    """What happened so far: admitted prompts' tokens, those found in the KV cache, preemptions."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0


@final
class Scheduler:
    """Waiting and running sequences.

    Args:
        pool: where blocks come from.
        block_size: tokens per block.
        max_tokens: most tokens in one step.
        max_seqs: most sequences in one step.
        prefix_caching: whether a prompt's beginning is taken from blocks that hold it already.
    """

    def __init__(
        self, pool: BlockPool, *, block_size: int, max_tokens: int, max_seqs: int, prefix_caching: bool = True
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_tokens = max_tokens
        self._max_seqs = max_seqs
        self._prefix_caching = prefix_caching
        self._running: list[Sequence] = []
        self._waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.counts = SchedulerCounts()

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with blocks."""
        return len(self._running)

    def check(self, max_length: int) -> None:
        """Raise CapacityError where a sequence of up to so many tokens could never run. Any thread may call it."""
        needed = self._num_blocks(max_length - 1)  # the last token is not computed
        if needed > self._pool.num_blocks:
            raise CapacityError(
                asked=f"a sequence of up to {max_length} tokens, {needed} blocks of the KV cache",
                found=f"the KV cache has {self._pool.num_blocks} blocks",
                try_="ask for fewer tokens, or make the KV cache larger",
            )

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn; raises CapacityError if it could never run."""
        self.check(sequence.max_length)
        self._waiting[sequence] = None

    def schedule(self) -> ScheduledBatch:
        """Return the next step's batch and give its sequences the blocks that they need for it.

        The step is taken to succeed: blocks that it fills can be found from now on, by later sequences of the same
        batch as well, because a forward writes all new keys and values of a layer before it attends over any.
        """
        items: list[ScheduledSequence] = []
        preempted = self._schedule_running(items)
        num_decode = len(items)
        if items and items[-1].sequence.num_uncomputed > 1:
            num_decode -= 1
        self._admit(items, preempted)
        if not items:
            raise InternalError(f"nothing to run, with {len(self._running)} running and {len(self._waiting)} waiting")
        return ScheduledBatch(tuple(items), num_decode, tuple(preempted))

    def advance(self, batch: ScheduledBatch) -> None:
        """Note that a batch was computed."""
        for sequence, start, num_new in batch.items:
            sequence.num_computed = start + num_new

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, whether it waits or runs, and free its blocks."""
        if sequence in self._waiting:
            del self._waiting[sequence]
        else:
            self._running.remove(sequence)
        self._release(sequence)

    def preempt_all(self) -> list[Sequence]:
        """Take everyone's blocks and forget all contents, as when the KV cache is lost; returns whom it hit."""
        hit = []
        while self._running:
            hit.append(self._preempt_last())
        self._pool.forget_contents()
        return hit

    def _schedule_running(self, items: list[ScheduledSequence]) -> list[Sequence]:
        """Add those who run to `items`; returns those who lost their blocks."""
        running, pool, block_size = self._running, self._pool, self._block_size
        preempted: list[Sequence] = []
        budget = self._max_tokens
        index = 0
        while index < len(running):
            sequence = running[index]
            index += 1
            start = sequence.num_computed
            num_new = min(len(sequence.tokens) - start, budget)
            room = len(sequence.blocks) * block_size - start
            if num_new > room:
                needed = -(-(num_new - room) // block_size)
                while needed > pool.num_free and index < len(running):
                    preempted.append(self._preempt_last())
                # the last in the line makes do with what there is, which may be nothing
                sequence.blocks += pool.allocate(min(needed, pool.num_free))
                num_new = min(num_new, len(sequence.blocks) * block_size - start)
            if num_new:
                items.append(ScheduledSequence(sequence, start, num_new))
                budget -= num_new
                if (start + num_new) // block_size > start // block_size:
                    self._publish(sequence, start, start + num_new)
        return preempted

    def _admit(self, items: list[ScheduledSequence], preempted: list[Sequence]) -> None:
        """Add those who wait to `items`, first come, first served, as far as tokens and blocks suffice.

        Whoever was preempted for this batch is not admitted to it, even where fewer blocks would do now: a prompt whose
        log-probabilities were asked for shares blocks with others only once it has them.
        """
        budget = self._max_tokens - sum([item.num_new for item in items])
        while self._waiting and budget and len(self._running) < self._max_seqs:
            if self._pool.num_free <= len(self._running):
                break  # what follows would say the same, after looking at the whole prompt
            sequence = next(iter(self._waiting))
            if sequence in preempted:
                break
            cached = self._find_prefix(sequence)
            needed = self._num_blocks(len(sequence.tokens)) - len(cached)
            # a block for each who runs, who would otherwise soon preempt the one that is admitted now
            reserve = len(self._running)
            if needed + reserve > self._pool.num_free - self._pool.num_free_among(cached):
                break
            del self._waiting[sequence]
            self._running.append(sequence)
            start = len(cached) * self._block_size
            self._count(sequence, start)
            num_new = min(len(sequence.tokens) - start, budget)
            self._pool.take(cached)
            sequence.blocks = cached + self._pool.allocate(self._num_blocks(start + num_new) - len(cached))
            sequence.num_computed = start
            items.append(ScheduledSequence(sequence, start, num_new))
            budget -= num_new
            self._publish(sequence, start, start + num_new)

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Return blocks that hold the beginning of a sequence; at least its last token is left to compute."""
        if not self._prefix_caching:
            return []
        length = len(sequence.tokens) - 1
        if sequence.wants_prompt_logits and sequence.num_scored < sequence.num_prompt - 1:
            length = min(length, sequence.num_scored)
        num_full = length // self._block_size
        self._extend_digests(sequence, num_full)
        return self._pool.find(sequence.digests[:num_full])

    def _publish(self, sequence: Sequence, start: int, end: int) -> None:
        """Let the blocks that are full once the tokens [start, end) are computed be found."""
        if self._prefix_caching:
            first, stop = start // self._block_size, end // self._block_size
            self._extend_digests(sequence, stop)
            for index in range(first, stop):
                self._pool.publish(sequence.blocks[index], sequence.digests[index])

    def _extend_digests(self, sequence: Sequence, num_full: int) -> None:
        digests, size = sequence.digests, self._block_size
        for index in range(len(digests), num_full):
            parent = digests[-1] if digests else FIRST_PARENT
            digests.append(block_digest(parent, sequence.tokens[index * size : (index + 1) * size]))

    def _preempt_last(self) -> Sequence:
        sequence = self._running.pop()
        self._release(sequence)
        self.counts.preemptions += 1
        self._waiting[sequence] = None
        self._waiting.move_to_end(sequence, last=False)
        return sequence

    def _release(self, sequence: Sequence) -> None:
        self._pool.free(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0

    def _count(self, sequence: Sequence, num_cached: int) -> None:
        if sequence.num_cached < 0:  # not when it is computed again
            sequence.num_cached = num_cached
            sequence.scheduled_s = time.perf_counter()
            self.counts.prompt_tokens += sequence.num_prompt
            self.counts.cached_tokens += num_cached

    def _num_blocks(self, num_tokens: int) -> int:
        return num_blocks_for(num_tokens, block_size=self._block_size)
