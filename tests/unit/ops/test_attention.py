"""The attention op against a dense, per-token reference, and the rules of its registration."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from piecework.ops.attention import attention_native, register

BLOCK_SIZE = 4
HEAD_DIM = 8


@dataclass(frozen=True)
class Case:
    """A batch for the op and, per sequence, its whole history of keys and values."""

    args: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]
    histories: list[tuple[Tensor, Tensor]]


def make_case(
    sequences: list[tuple[int, int]], *, heads: int, kv_heads: int, dtype: torch.dtype = torch.float32
) -> Case:
    """Build a batch from (tokens already cached, new tokens) per sequence; decode sequences first."""
    generator = torch.Generator().manual_seed(0)
    width = max(-(-(old + new) // BLOCK_SIZE) for old, new in sequences) + 1
    tables = (torch.randperm(len(sequences) * width, generator=generator) + 1).view(len(sequences), width)
    cache = torch.full((2, len(sequences) * width + 1, BLOCK_SIZE, kv_heads, HEAD_DIM), 7.0, dtype=dtype)
    queries, keys, values, slots, histories = [], [], [], [], []
    for (old, new), table in zip(sequences, tables, strict=True):
        positions = torch.arange(old + new)
        slot = table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        key, value = torch.randn(2, old + new, kv_heads, HEAD_DIM, generator=generator).to(dtype)
        flat = cache.view(2, -1, kv_heads, HEAD_DIM)
        flat[0, slot[:old]], flat[1, slot[:old]] = key[:old], value[:old]
        queries.append(torch.randn(new, heads, HEAD_DIM, generator=generator).to(dtype))
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


def reference(case: Case, *, scale: float, window: int = 0, softcap: float = 0.0) -> Tensor:
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
            start = max(0, end - window) if window else 0
            scores = torch.einsum("hd,lhd->hl", row, keys[start:end]) * scale
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            rows.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), values[start:end]))
    return torch.stack(rows)


BATCHES = {
    "one decode": [(5, 1)],
    "one decode at a block's end": [(7, 1)],
    "first token": [(0, 1)],
    "decodes": [(5, 1), (0, 1), (11, 1)],
    "prefill": [(0, 9)],
    "prefills": [(0, 9), (0, 2)],
    "chunk": [(6, 5)],
    "mixed": [(3, 1), (12, 1), (0, 6), (4, 3)],
    "one decode, one prefill": [(3, 1), (0, 6)],
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (3, 0.0), (0, 2.0), (4, 1.5), (100, 0.0)])
def test_equals_the_dense_reference(batch: str, heads: int, kv_heads: int, window: int, softcap: float) -> None:
    case = make_case(BATCHES[batch], heads=heads, kv_heads=kv_heads)
    out = attention_native(*case.args, scale=0.3, sliding_window=window, softcap=softcap)
    assert out.is_contiguous()
    expected = reference(case, scale=0.3, window=window, softcap=softcap)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
def test_bfloat16_is_as_close_as_its_rounding(batch: str) -> None:
    case = make_case(BATCHES[batch], heads=4, kv_heads=2, dtype=torch.bfloat16)
    out = attention_native(*case.args, scale=0.3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), reference(case, scale=0.3), atol=2e-2, rtol=2e-2)


def test_writes_every_new_token_to_its_slot_and_nothing_else() -> None:
    case = make_case(BATCHES["mixed"], heads=4, kv_heads=2)
    cache, slots = case.args[3], case.args[4]
    before = cache.clone()
    attention_native(*case.args, scale=0.3)
    flat, flat_before = cache.view(2, -1, 2, HEAD_DIM), before.view(2, -1, 2, HEAD_DIM)
    assert torch.equal(flat[0, slots], case.args[1])
    assert torch.equal(flat[1, slots], case.args[2])
    others = torch.ones(flat.shape[1], dtype=torch.bool)
    others[slots] = False
    assert torch.equal(flat[:, others], flat_before[:, others])


def test_the_op_is_the_native_function() -> None:
    case, twin = (make_case(BATCHES["mixed"], heads=4, kv_heads=2) for _ in range(2))
    assert torch.equal(torch.ops.piecework.attention(*case.args, scale=0.3), attention_native(*twin.args, scale=0.3))
    assert torch.equal(case.args[3], twin.args[3])


def test_the_op_has_a_meta_form() -> None:
    case = make_case(BATCHES["mixed"], heads=4, kv_heads=2)
    on_meta = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in case.args]
    out = torch.ops.piecework.attention(*on_meta, scale=0.3)
    assert out.shape == case.args[0].shape
    assert out.is_contiguous()


def test_registering_twice_changes_nothing() -> None:
    before = torch.ops.piecework.attention.default
    register()
    assert torch.ops.piecework.attention.default is before


def test_importing_the_op_imports_no_compiler() -> None:
    code = (
        "import sys, piecework.ops.attention as op, importlib; importlib.reload(op); "
        "bad = {'sympy', 'torch._dynamo', 'torch._inductor', 'triton', 'transformers'} & set(sys.modules); "
        "raise SystemExit(f'imported {sorted(bad)}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
