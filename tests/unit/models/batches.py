"""Batches for models over a paged cache, and what transformers says about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

BLOCK = 16


@dataclass(frozen=True)
class Part:
    """A sequence's tokens so far, how many of them are new, and its blocks; the first is its state slot as well."""

    tokens: Tensor
    num_new: int
    blocks: list[int]


def inputs_of(parts: list[Part]) -> dict[str, Tensor | int]:
    """Return the inputs of a forward; sequences with one new token that come first decode."""
    ids, positions, slots = [], [], []
    width = max(len(part.blocks) for part in parts)
    for part in parts:
        where = torch.arange(len(part.tokens) - part.num_new, len(part.tokens))
        ids.append(part.tokens[where])
        positions.append(where)
        slots.append(torch.tensor(part.blocks)[where // BLOCK] * BLOCK + where % BLOCK)
    news = [part.num_new for part in parts]
    num_decode = next((i for i, num_new in enumerate(news) if num_new != 1), len(parts))
    return {
        "input_ids": torch.cat(ids),
        "positions": torch.cat(positions),
        "slot_mapping": torch.cat(slots),
        "block_tables": torch.tensor([part.blocks + [0] * (width - len(part.blocks)) for part in parts]),
        "seq_lens": torch.tensor([len(part.tokens) for part in parts]),
        "query_start": torch.tensor([0, *news]).cumsum(0),
        "logits_indices": torch.arange(sum(news)),
        "state_slots": torch.tensor([part.blocks[0] for part in parts]),
        "num_decode_tokens": num_decode,
        "num_prefill_tokens": sum(news) - num_decode,
    }


def every_regime() -> list[list[Part]]:
    """Return steps over 12 blocks: a token alone, a mix, chunks with what was cached before, decode only, a mix."""
    a, b, c = (torch.randint(3, 131, (50,), generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    ours, theirs, third = [7, 2, 5, 11], [1, 8, 3], [4, 9, 6, 10]
    return [
        [Part(a[:1], 1, ours)],
        [Part(a[:2], 1, ours), Part(b[:17], 17, theirs), Part(c[:5], 5, third)],
        [Part(b[:30], 13, theirs), Part(c[:33], 28, third)],
        [Part(a[:3], 1, ours), Part(b[:31], 1, theirs), Part(c[:34], 1, third)],
        [Part(a[:4], 1, ours), Part(c[:50], 16, third), Part(b[:40], 9, theirs)],
    ]


class Model(Protocol):
    """A loaded model or an eager one."""

    def run(self, inputs: Mapping[str, Tensor | int]) -> list[Tensor]:
        """Run a forward."""


def run(model: Model, parts: list[Part]) -> Tensor:
    """Return the logits of all new tokens."""
    (logits,) = model.run(inputs_of(parts))
    return logits


def expected(reference: nn.Module, parts: list[Part]) -> Tensor:
    """Return what transformers computes for them."""
    with torch.inference_mode():
        return torch.cat([reference(part.tokens.unsqueeze(0)).logits[0, -part.num_new :] for part in parts])


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, by the largest of `wanted`."""
    return float((found - wanted).abs().max() / wanted.abs().max())
