"""Which blocks of the KV cache are free. Works without torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from piecework.errors import CapacityError, InternalError


def num_blocks_for(num_tokens: int, *, block_size: int) -> int:
    """Return how many blocks hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


@final
class BlockPool:
    """Hands out blocks by number, 0 to num_blocks - 1; what was freed last is handed out first."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def num_blocks(self) -> int:
        """All blocks, free or not."""
        return self._num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Return `num_blocks` blocks, the caller's until freed; raises CapacityError if fewer are free."""
        if num_blocks > len(self._free):
            raise CapacityError(
                asked=f"{num_blocks} blocks of the KV cache",
                found=f"{len(self._free)} of {self._num_blocks} are free",
                try_="wait for a sequence to end, or make the KV cache larger",
            )
        blocks = [self._free.pop() for _ in range(num_blocks)]
        self._used.update(blocks)
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Take blocks back; raises InternalError, and takes none, if one of them isn't in use."""
        blocks = list(blocks)
        if len(set(blocks)) != len(blocks) or not self._used.issuperset(blocks):
            raise InternalError(f"blocks freed that are not in use: {sorted(set(blocks) - self._used) or blocks}")
        self._used.difference_update(blocks)
        self._free.extend(reversed(blocks))
