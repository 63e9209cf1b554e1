"""Which blocks of the KV cache are free, and which hold tokens that another request can use. Works without torch.

A full block is known by a digest of its tokens and of everything before them, so equal digests mean equal contents. A
block that nobody refers to any more keeps its contents, and can be found by its digest, until it is handed out again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final, final

from piecework.errors import CapacityError, InternalError

DEFAULT_BLOCK_SIZE: Final = 16
FIRST_PARENT: Final = b""


def num_blocks_for(num_tokens: int, *, block_size: int) -> int:
    """Return how many blocks hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


def block_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the digest of a full block: SHA-256 over its parent's digest (`FIRST_PARENT` at the start) and tokens."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


@final
class BlockPool:
    """Counts references to blocks, numbered 0 to num_blocks - 1.

    Blocks without contents are handed out first, then the one whose contents were not used for the longest time.
    """

    def __init__(self, num_blocks: int) -> None:
        self._references = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # every block without references is in one of these two; the oldest contents come first
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_blocks(self) -> int:
        """All blocks, free or not."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Blocks without references, which can be allocated now."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks that still have contents."""
        return len(self._cached)

    def num_references(self, block: int) -> int:
        """Return how many hold the block."""
        return self._references[block]

    def allocate(self, num_blocks: int) -> list[int]:
        """Return `num_blocks` blocks with one reference each; raises CapacityError if fewer are free."""
        if num_blocks > self.num_free:
            raise CapacityError(
                asked=f"{num_blocks} blocks of the KV cache",
                found=f"{self.num_free} of {self.num_blocks} are free",
                try_="wait for a sequence to end, or make the KV cache larger",
            )
        blocks = [self._empty.pop() if self._empty else self._evict() for _ in range(num_blocks)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def take(self, blocks: Sequence[int]) -> None:
        """Add a reference to each of `blocks`, which `find` returned just now."""
        for block in blocks:
            if not self._references[block]:
                del self._cached[block]
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block of a sequence; the first ones keep their contents longest.

        Raises InternalError, and drops none, if one of them has none or is there twice.
        """
        if len(set(blocks)) != len(blocks) or not all(self._references[block] for block in blocks):
            raise InternalError(f"blocks freed that are not in use, or twice: {list(blocks)}")
        # a block can only be found through those before it, so the last ones have to go first
        for block in reversed(blocks):
            self._references[block] -= 1
            if not self._references[block]:
                if self._digest_of[block] is None:
                    self._empty.append(block)
                else:
                    self._cached[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """Let a block that is in use and full be found by its contents; the first of equal ones stays the one."""
        if not self._references[block]:
            raise InternalError(f"block {block} published, which nobody holds")
        if digest not in self._block_of and self._digest_of[block] is None:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest run of `digests`, from the first, that are there. Nobody's until taken."""
        found = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """Return how many of `blocks` have no reference: so many fewer will be free when they are taken."""
        return sum(not self._references[block] for block in blocks)

    def forget_contents(self) -> None:
        """Let no block be found by its contents any more; references stay."""
        self._empty += self._cached
        self._cached.clear()
        self._block_of.clear()
        self._digest_of = [None] * self.num_blocks

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        digest = self._digest_of[block]
        assert digest is not None
        del self._block_of[digest]
        self._digest_of[block] = None
        return block
