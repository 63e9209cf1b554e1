"""Sequences that go through a mixer in forwards of different batches, as an engine would send them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from piecework.ops.ir.forward_context import Batch

Run = Callable[[Batch, Tensor], Tensor]
"""Runs a mixer on the new tokens' indices (sequence, position) [T, 2] of a batch; gives its result [T, ...]."""

# Each forward lists (sequence, new tokens). Decode sequences, one token each, come first; 0 new tokens are allowed.
SCHEDULES: dict[str, list[list[tuple[int, int]]]] = {
    "whole prompts": [[(0, 11), (1, 7), (2, 9)]],
    "one by one": [[(0, 11)], [(1, 7)], [(2, 9)]],
    "in chunks": [[(0, 4), (1, 7)], [(0, 3), (2, 5)], [(0, 4), (2, 4)]],
    "chunks shorter than the convolution": [[(0, 2), (1, 2)], [(0, 1), (1, 5), (2, 9)], [(0, 8)]],
    "prompts, then decode": [[(0, 8), (1, 4), (2, 6)], *[[(0, 1), (1, 1), (2, 1)]] * 3],
    "mixed": [[(0, 9)], [(0, 1), (1, 3), (2, 5)], [(0, 1), (2, 3), (1, 4)], [(2, 1)]],
    "decode from the first token": [[(0, 1), (1, 1), (2, 1)]] * 7 + [[(0, 1), (2, 1)]] * 2 + [[(0, 1)]] * 2,
    "sequences without a new token": [[(0, 1), (1, 0), (2, 9)], [(0, 1), (1, 7), (2, 0)], [(1, 0), (0, 9)]],
}
NUM_DECODE = {"sequences without a new token": [1, 1, 0]}
LENGTHS = (11, 7, 9)


def run_schedule(name: str, run: Run, *, slots: Sequence[int]) -> list[Tensor]:
    """Send three sequences of `LENGTHS` tokens through a schedule; return each one's results in order."""
    done = [0] * len(LENGTHS)
    results: list[list[Tensor]] = [[] for _ in LENGTHS]
    for step, forward in enumerate(SCHEDULES[name]):
        decodes = next((i for i, (_, new) in enumerate(forward) if new != 1), len(forward))
        num_decode = NUM_DECODE[name][step] if name in NUM_DECODE else decodes
        tokens = [(s, done[s] + i) for s, new in forward for i in range(new)]
        for sequence, new in forward:
            done[sequence] += new
        batch = make_batch([(done[s], new) for s, new in forward], [slots[s] for s, _ in forward], num_decode)
        out = run(batch, torch.tensor(tokens))
        for (sequence, _), row in zip(tokens, out, strict=True):
            results[sequence].append(row)
    assert done == list(LENGTHS)
    return [torch.stack(rows) for rows in results]


def make_batch(sequences: Sequence[tuple[int, int]], slots: Sequence[int], num_decode: int) -> Batch:
    """Return the batch of sequences given as (tokens after this forward, new tokens)."""
    new = torch.tensor([n for _, n in sequences])
    return Batch(
        slot_mapping=torch.zeros(int(new.sum()), dtype=torch.int64),
        block_tables=torch.zeros(len(sequences), 1, dtype=torch.int64),
        seq_lens=torch.tensor([length for length, _ in sequences]),
        query_start=torch.cat([torch.zeros(1, dtype=torch.int64), new.cumsum(0)]),
        num_decode_tokens=num_decode,
        state_slots=torch.tensor(slots, dtype=torch.int64),
    )
