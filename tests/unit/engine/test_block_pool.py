"""The block pool: no block is lost, none is given out twice."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from piecework.engine.block_pool import BlockPool, num_blocks_for
from piecework.errors import CapacityError, InternalError


class PoolMachine(RuleBasedStateMachine):
    """Allocations and frees in any order, against a plain model."""

    @initialize(num_blocks=st.integers(0, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.held: list[list[int]] = []

    @rule(num_blocks=st.integers(0, 14))
    def allocate(self, num_blocks: int) -> None:
        free = self.pool.num_free
        if num_blocks > free:
            with pytest.raises(CapacityError):
                self.pool.allocate(num_blocks)
            assert self.pool.num_free == free
        else:
            blocks = self.pool.allocate(num_blocks)
            assert len(blocks) == num_blocks
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def free_twice(self, data: st.DataObject) -> None:
        blocks = self.held.pop(data.draw(st.sampled_from([i for i, b in enumerate(self.held) if b])))
        self.pool.free(blocks)
        free = self.pool.num_free
        with pytest.raises(InternalError):
            self.pool.free(blocks)
        assert self.pool.num_free == free

    @precondition(lambda self: any(self.held))
    @rule()
    def free_a_block_twice_at_once(self) -> None:
        block = next(blocks for blocks in self.held if blocks)[0]
        with pytest.raises(InternalError):
            self.pool.free([block, block])

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        held = [block for blocks in self.held for block in blocks]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(self.pool.num_blocks))
        assert len(held) + self.pool.num_free == self.pool.num_blocks


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestPool = PoolMachine.TestCase


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for_tokens(num_tokens: int, num_blocks: int) -> None:
    assert num_blocks_for(num_tokens, block_size=16) == num_blocks
