"""Which context of which prompts is expanded together: memory is for some tokens at a time, of all prompts together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

LEAST_CHUNK: Final = 256  # tokens; what is less pays only where it is all there is
_TILE_ROWS: Final = 64  # what tiles of rows divide, whatever the machine


@dataclass(frozen=True)
class Chunk:
    """Some context of a sequence, `begin` and on, for one round; see `Prompt` in calls.h."""

    seq: int
    begin: int
    count: int
    state: int = -1
    resumed: bool = False
    paused: bool = False


def share_out(context: Mapping[int, int], new: Sequence[int], *, most: int) -> list[list[Chunk]]:
    """Share the sequences' context out over rounds of at most `most` tokens; what doesn't fit goes on in the next.

    New tokens come with the last chunk of their sequence's context. There is one round at least.
    """
    rounds: list[list[Chunk]] = [[]]
    left, state = most, 0
    for seq, num in context.items():
        if num <= left:
            rounds[-1].append(Chunk(seq, 0, num))
            left -= num
            continue
        for begin, count in _cuts(num, first=left, most=most):
            if count > left:
                rounds.append([])
                left = most
            paused = begin + count < num
            rounds[-1].append(Chunk(seq, begin, count, state=state, resumed=begin > 0, paused=paused))
            left -= count
        state += padded(new[seq])
    return rounds


def _cuts(num: int, *, first: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, count) of parts of `num` tokens: `first`, unless that is too few to pay, then `most` each."""
    begin = 0
    if first >= LEAST_CHUNK:
        yield 0, first
        begin = first
    for at in range(begin, num, most):
        yield at, min(most, num - at)


def padded(rows: int) -> int:
    """Return how many rows the tiles of some rows have."""
    return -(-rows // _TILE_ROWS) * _TILE_ROWS
