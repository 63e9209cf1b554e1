"""A scheduled batch as the tensors of a model's forward."""

from __future__ import annotations

import torch
from torch import Tensor

from piecework.engine.scheduler import ScheduledBatch


def build_inputs(batch: ScheduledBatch, *, block_size: int) -> dict[str, Tensor | int]:
    """Return the forward's named inputs; see `models/adapter.py`. All tensors are int64.

    Logits are wanted of every sequence's last scheduled token, in the batch's order. The block table is as wide as the
    longest sequence needs now, and shorter rows are padded with their own first block.
    """
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    seq_lens: list[int] = []
    query_start = [0]
    logits_indices: list[int] = []
    for item in batch.items:
        blocks, start, end = item.sequence.blocks, item.start, item.start + item.num_new
        input_ids += item.sequence.tokens[start:end]
        positions += range(start, end)
        slots += [blocks[p // block_size] * block_size + p % block_size for p in range(start, end)]
        seq_lens.append(end)
        query_start.append(len(input_ids))
        logits_indices.append(len(input_ids) - 1)
    width = -(-max(seq_lens) // block_size)
    tables = [item.sequence.blocks[:width] for item in batch.items]
    return {
        "input_ids": torch.tensor(input_ids),
        "positions": torch.tensor(positions),
        "slot_mapping": torch.tensor(slots),
        "block_tables": torch.tensor([table + [table[0]] * (width - len(table)) for table in tables]),
        "seq_lens": torch.tensor(seq_lens),
        "query_start": torch.tensor(query_start),
        "logits_indices": torch.tensor(logits_indices),
        "num_decode_tokens": batch.num_decode,
    }
