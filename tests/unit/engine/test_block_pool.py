"""The block pool: no block is lost, none is given out twice, and what is found by its contents has them."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from piecework.engine.block_pool import FIRST_PARENT, BlockPool, block_digest, num_blocks_for
from piecework.errors import CapacityError, InternalError


class PoolMachine(RuleBasedStateMachine):
    """Allocations, prefix hits and frees in any order, against a model that knows what each block really holds.

    Each holder is a chain of blocks of one token; its first `num_full` blocks are written and published.
    """

    @initialize(num_blocks=st.integers(0, 9))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.holders: list[list[int]] = []
        self.contents: list[tuple[int, ...] | None] = [None] * num_blocks
        self.num_full: list[int] = []

    def digests(self, tokens: tuple[int, ...]) -> list[bytes]:
        made = [FIRST_PARENT]
        for token in tokens:
            made.append(block_digest(made[-1], (token,)))
        return made[1:]

    def drop(self, index: int) -> list[int]:
        del self.num_full[index]
        return self.holders.pop(index)

    @rule(num_blocks=st.integers(0, 5))
    def allocate(self, num_blocks: int) -> None:
        free = self.pool.num_free
        if num_blocks > free:
            with pytest.raises(CapacityError):
                self.pool.allocate(num_blocks)
            assert self.pool.num_free == free
            return
        held = {block for blocks in self.holders for block in blocks}
        blocks = self.pool.allocate(num_blocks)
        assert len(blocks) == num_blocks
        assert not held & set(blocks), "a block with references was handed out"
        for block in blocks:
            self.contents[block] = None
        self.holders.append(blocks)
        self.num_full.append(0)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), token=st.integers(0, 1))
    def fill_the_next_block(self, data: st.DataObject, token: int) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        blocks, full = self.holders[index], self.num_full[index]
        if full == len(blocks):
            return
        before = self.contents[blocks[full - 1]] if full else ()
        assert before is not None
        self.contents[blocks[full]] = (*before, token)
        self.pool.publish(blocks[full], self.digests((*before, token))[-1])
        self.num_full[index] += 1

    @rule(tokens=st.lists(st.integers(0, 1), max_size=4).map(tuple))
    def take_a_prefix(self, tokens: tuple[int, ...]) -> None:
        found = self.pool.find(self.digests(tokens))
        for length, block in enumerate(found, start=1):
            assert self.contents[block] == tokens[:length], "stale contents were found"
        free = self.pool.num_free
        among = self.pool.num_free_among(found)
        self.pool.take(found)
        assert self.pool.num_free == free - among
        self.holders.append(found)
        self.num_full.append(len(found))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.drop(data.draw(st.integers(0, len(self.holders) - 1))))

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data())
    def free_what_is_free(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from([i for i, blocks in enumerate(self.holders) if blocks]))
        blocks = self.drop(index)
        self.pool.free(blocks)
        if all(self.pool.num_references(block) for block in blocks):
            return
        free = self.pool.num_free
        with pytest.raises(InternalError):
            self.pool.free(blocks)
        assert self.pool.num_free == free

    @precondition(lambda self: any(self.holders))
    @rule()
    def free_a_block_twice_at_once(self) -> None:
        block = next(blocks for blocks in self.holders if blocks)[0]
        with pytest.raises(InternalError):
            self.pool.free([block, block])

    @rule()
    def forget(self) -> None:
        self.pool.forget_contents()
        assert self.pool.num_cached == 0
        assert not self.pool.find(self.digests((0,)) + self.digests((1,)))
        self.num_full = [len(blocks) for blocks in self.holders]  # so that nothing is published over unknown contents

    @invariant()
    def every_reference_is_counted(self) -> None:
        held = [block for blocks in self.holders for block in blocks]
        assert [self.pool.num_references(block) for block in range(self.pool.num_blocks)] == [
            held.count(block) for block in range(self.pool.num_blocks)
        ]
        assert len(set(held)) + self.pool.num_free == self.pool.num_blocks


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for_tokens(num_tokens: int, num_blocks: int) -> None:
    assert num_blocks_for(num_tokens, block_size=16) == num_blocks


def test_a_digest_stands_for_the_tokens_and_all_before_them() -> None:
    first = block_digest(FIRST_PARENT, (1, 2))
    assert first == block_digest(FIRST_PARENT, [1, 2])
    others = [block_digest(FIRST_PARENT, (2, 1)), block_digest(first, (1, 2)), block_digest(FIRST_PARENT, (513,))]
    assert len({first, *others}) == 4


def chain(pool: BlockPool, length: int, *, start: int = 0) -> tuple[list[int], list[bytes]]:
    """Allocate and publish a chain of full blocks of one token."""
    blocks, digests = pool.allocate(length), [FIRST_PARENT]
    for token in range(start, start + length):
        digests.append(block_digest(digests[-1], (token,)))
    for block, digest in zip(blocks, digests[1:], strict=True):
        pool.publish(block, digest)
    return blocks, digests[1:]


def test_what_was_used_longest_ago_goes_first_and_a_chain_from_its_end() -> None:
    pool = BlockPool(5)
    old, old_digests = chain(pool, 2)
    new, new_digests = chain(pool, 2, start=7)
    pool.free(old)
    pool.free(new)
    assert (pool.num_free, pool.num_cached) == (5, 4)
    pool.allocate(1)  # the empty one
    assert pool.find(old_digests) == old
    assert pool.allocate(1) == old[1:]
    assert pool.find(old_digests) == old[:1]
    pool.take(pool.find(new_digests))
    assert pool.allocate(1) == old[:1]
    assert pool.find(new_digests) == new


def test_equal_contents_are_found_once() -> None:
    pool = BlockPool(2)
    (first,), digests = chain(pool, 1)
    (second,), _ = chain(pool, 1)
    assert pool.find(digests) == [first]
    pool.free([second])
    assert pool.num_cached == 0
    pool.free([first])
    assert pool.num_cached == 1
