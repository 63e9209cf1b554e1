"""Which sequences run in the next step, and how many tokens of each. Works without torch.

A sequence is admitted when the pool has blocks for all it may grow to, so nothing is ever preempted. A step takes one
token of every decoding sequence first; what remains of the token budget goes to prompts, in chunks where it must.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import final

from piecework.engine.block_pool import BlockPool, num_blocks_for
from piecework.engine.request import Sequence
from piecework.errors import CapacityError


@dataclass(frozen=True)
class ScheduledSequence:
    """The tokens [start, start + num_new) of a sequence."""

    sequence: Sequence
    start: int
    num_new: int


@dataclass(frozen=True)
class ScheduledBatch:
    """What runs in one step: the first `num_decode` items are decoding sequences with one new token each."""

    items: tuple[ScheduledSequence, ...]
    num_decode: int


@final
class Scheduler:
    """Waiting and running sequences.

    Args:
        pool: where blocks come from.
        block_size: tokens per block.
        max_tokens: most tokens in one step.
        max_seqs: most sequences in one step.
    """

    def __init__(self, pool: BlockPool, *, block_size: int, max_tokens: int, max_seqs: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_tokens = max_tokens
        self._max_seqs = max_seqs
        self._waiting: deque[Sequence] = deque()
        self._running: deque[Sequence] = deque()

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._running)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn; raises CapacityError if it could never run."""
        needed = self._num_blocks_of(sequence)
        if needed > self._pool.num_blocks:
            raise CapacityError(
                asked=f"a sequence of up to {sequence.max_length} tokens, {needed} blocks of the KV cache",
                found=f"the KV cache has {self._pool.num_blocks} blocks",
                try_="ask for fewer tokens, or make the KV cache larger",
            )
        self._waiting.append(sequence)

    def schedule(self) -> ScheduledBatch:
        """Return the next step's batch, in which sequences take turns where not all fit.

        Raises CapacityError where nothing can run because others hold the pool's blocks.
        """
        self._admit()
        if not self._running:
            raise CapacityError(
                asked="the next step of a generation",
                found=f"{self._pool.num_free} of {self._pool.num_blocks} blocks of the KV cache are free",
                try_="let the other generation of this engine end first",
            )
        decodes = [sequence for sequence in self._running if sequence.is_decoding]
        prefills = [sequence for sequence in self._running if not sequence.is_decoding]
        # where there is room for more than one token, one is left for prompts, so that they don't wait for ever
        room = min(self._max_tokens, self._max_seqs)
        decodes = decodes[: max(1, room - 1) if prefills else room]
        items = [ScheduledSequence(sequence, sequence.num_computed, 1) for sequence in decodes]
        budget = self._max_tokens - len(items)
        for sequence in prefills:
            if not budget or len(items) == self._max_seqs:
                break
            num_new = min(sequence.num_uncomputed, budget)
            items.append(ScheduledSequence(sequence, sequence.num_computed, num_new))
            budget -= num_new
        if len(items) < len(self._running):
            scheduled = {id(item.sequence) for item in items}
            self._running = deque(sorted(self._running, key=lambda sequence: id(sequence) in scheduled))
        return ScheduledBatch(tuple(items), num_decode=len(decodes))

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, whether it waits or runs, and free its blocks."""
        self._pool.free(sequence.blocks)
        sequence.blocks = []
        for queue in (self._waiting, self._running):
            if sequence in queue:
                queue.remove(sequence)

    def _admit(self) -> None:
        while self._waiting and self._num_blocks_of(self._waiting[0]) <= self._pool.num_free:
            sequence = self._waiting.popleft()
            sequence.blocks = self._pool.allocate(self._num_blocks_of(sequence))
            self._running.append(sequence)

    def _num_blocks_of(self, sequence: Sequence) -> int:
        return num_blocks_for(sequence.max_length, block_size=self._block_size)
