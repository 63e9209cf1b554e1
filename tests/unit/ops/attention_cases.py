"""Batches for attention over a paged cache, and what must come out, token by token in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

BLOCK_SIZE = 4
HEAD_DIM = 8

BATCHES = {
    "one decode": [(5, 1)],
    "one decode at a block's end": [(7, 1)],
    "first token": [(0, 1)],
    "decodes": [(5, 1), (0, 1), (11, 1)],
    "decodes as long": [(9, 1), (9, 1), (9, 1)],
    "prefill": [(0, 9)],
    "prefills": [(0, 9), (0, 2)],
    "prefills alike": [(0, 6), (3, 5), (0, 6)],
    "chunk": [(6, 5)],
    "mixed": [(3, 1), (12, 1), (0, 6), (4, 3)],
    "one decode, one prefill": [(3, 1), (0, 6)],
    "uneven": [(90, 1), (2, 1), (31, 1), (1, 1), (70, 40)],
}


@dataclass(frozen=True)
class Case:
    """A batch for the op and, per sequence, its whole history of keys and values."""

    args: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]
    histories: list[tuple[Tensor, Tensor]]


def make_case(
    sequences: list[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    dtype: torch.dtype = torch.float32,
    head_dim: int = HEAD_DIM,
    block_size: int = BLOCK_SIZE,
    stale: float = 7.0,
    window: int = 0,
    chunk: int = 0,
    seed: int = 0,
) -> Case:
    """Build a batch from (tokens already cached, new tokens) per sequence; decode sequences first.

    Slots that hold no token, and those of tokens that no new one sees through `window` or in its `chunk`,
    hold `stale`.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(-(-(old + new) // block_size) for old, new in sequences) + 1
    tables = (torch.randperm(len(sequences) * width, generator=generator) + 1).view(len(sequences), width)
    cache = torch.full((2, len(sequences) * width + 1, block_size, kv_heads, head_dim), stale, dtype=dtype)
    queries, keys, values, slots, histories = [], [], [], [], []
    for (old, new), table in zip(sequences, tables, strict=True):
        positions = torch.arange(old + new)
        slot = table[positions // block_size] * block_size + positions % block_size
        key, value = torch.randn(2, old + new, kv_heads, head_dim, generator=generator).to(dtype)
        flat = cache.view(2, -1, kv_heads, head_dim)
        seen = slice(max(old + 1 - window if window else 0, old - old % chunk if chunk else 0, 0), old)
        flat[0, slot[seen]], flat[1, slot[seen]] = key[seen], value[seen]
        queries.append(torch.randn(new, heads, head_dim, generator=generator).to(dtype))
        keys.append(key[old:])
        values.append(value[old:])
        slots.append(slot[old:])
        histories.append((key, value))
    num_new = torch.tensor([new for _, new in sequences])
    query_start = torch.cat([torch.zeros(1, dtype=torch.int64), num_new.cumsum(0)])
    seq_lens = torch.tensor([old + new for old, new in sequences])
    num_decode = next((i for i, (_, new) in enumerate(sequences) if new != 1), len(sequences))
    query = torch.cat(queries).transpose(0, 1).contiguous().transpose(0, 1)  # strides as a model's projections give
    args = (query, torch.cat(keys), torch.cat(values), cache, torch.cat(slots), tables, seq_lens, query_start)
    return Case(args=(*args, num_decode), histories=histories)


def reference(
    case: Case,
    *,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    chunk: int = 0,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Attend token by token in float64."""
    query, query_start = case.args[0], case.args[7].tolist()
    rows = []
    for index, (keys, values) in enumerate(case.histories):
        groups = query.shape[1] // keys.shape[1]
        keys = keys.double().repeat_interleave(groups, dim=1)
        values = values.double().repeat_interleave(groups, dim=1)
        new = query[query_start[index] : query_start[index + 1]].double()
        for offset, row in enumerate(new):
            end = keys.shape[0] - new.shape[0] + offset + 1
            start = max(0, end - sliding_window) if sliding_window else 0
            start = max(start, (end - 1) // chunk * chunk) if chunk else start
            scores = torch.einsum("hd,lhd->hl", row, keys[start:end]) * scale
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            if key_bias is not None:
                scores = scores + key_bias[:, start:end].double() - key_bias[:, end - 1 : end].double()
            if sinks is not None:
                scores = torch.cat([scores, sinks.double().unsqueeze(1)], dim=1)
            weights = scores.softmax(-1)[:, : end - start]
            rows.append(torch.einsum("hl,lhd->hd", weights, values[start:end]))
    return torch.stack(rows)


TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@st.composite
def drawn_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCES)) -> tuple[Case, dict[str, Any]]:
    """Draw a batch and the options of the scores; what no token sees is NaN."""
    decodes = draw(st.lists(st.integers(0, 150), max_size=4))
    prefills = draw(st.lists(st.tuples(st.integers(0, 120), st.integers(2, 110)), max_size=3))
    sequences = [(old, 1) for old in decodes] + prefills
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    window = draw(st.sampled_from([0, 1, 2, 17, 64, 1000]))
    chunk = draw(st.sampled_from([0, 0, 3, 16, 50, 1000]))
    dtype = draw(st.sampled_from(dtypes))
    seed = draw(st.integers(0, 1000))
    case = make_case(
        sequences or [(0, 1)],
        heads=kv_heads * groups,
        kv_heads=kv_heads,
        dtype=dtype,
        head_dim=draw(st.sampled_from([2, 6, 16, 64, 80, 128, 130])),
        block_size=draw(st.sampled_from([1, 3, 16, 32])),
        stale=float("nan"),
        window=window,
        chunk=chunk,
        seed=seed,
    )
    sinks = None
    if draw(st.booleans()):
        sinks = torch.randn(kv_heads * groups, generator=torch.Generator().manual_seed(seed)).mul(4).to(dtype)
    key_bias = None
    if draw(st.booleans()):  # up to the longest sequence, 120 + 110 tokens
        key_bias = torch.randn(kv_heads * groups, 230, generator=torch.Generator().manual_seed(seed)) * 4
    options = {"scale": draw(st.sampled_from([0.05, 0.3])), "sliding_window": window, "sinks": sinks, "chunk": chunk}
    return case, {**options, "softcap": draw(st.sampled_from([0.0, 1.5, 30.0])), "key_bias": key_bias}
