"""The attention op against a dense, per-token reference, and the rules of its registration."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from piecework.ops.attention import attend, attention_native, register, write_kv
from tests.choice import one_in
from tests.unit.ops.attention_cases import BATCHES, HEAD_DIM, TOLERANCES, Case, drawn_cases, make_case, reference

NAN = float("nan")


@pytest.mark.parametrize(
    ("window", "softcap", "heads", "kv_heads", "batch"),
    one_in(5, [(0, 0.0), (3, 0.0), (0, 2.0), (4, 1.5), (100, 0.0)], [(4, 4), (4, 2), (3, 1)], BATCHES),
)
def test_equals_the_dense_reference(batch: str, heads: int, kv_heads: int, window: int, softcap: float) -> None:
    case = make_case(BATCHES[batch], heads=heads, kv_heads=kv_heads, stale=NAN, window=window)
    out = attention_native(*case.args, scale=0.3, sliding_window=window, softcap=softcap)
    assert out.is_contiguous()
    expected = reference(case, scale=0.3, sliding_window=window, softcap=softcap)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
def test_bfloat16_is_as_close_as_its_rounding(batch: str) -> None:
    case = make_case(BATCHES[batch], heads=4, kv_heads=2, dtype=torch.bfloat16)
    out = attention_native(*case.args, scale=0.3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), reference(case, scale=0.3), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("window", "softcap", "dtype", "batch"),
    one_in(4, [(0, 0.0), (4, 1.5)], [torch.float32, torch.bfloat16], BATCHES),
)
def test_sinks_take_weight_and_give_no_value(batch: str, window: int, softcap: float, dtype: torch.dtype) -> None:
    case = make_case(BATCHES[batch], heads=4, kv_heads=2, stale=NAN, window=window, dtype=dtype)
    options = {"sliding_window": window, "softcap": softcap, "sinks": torch.tensor([-3.0, 0.0, 1.0, 40.0]).to(dtype)}
    out = attention_native(*case.args, 0.3, **options)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out.double(), reference(case, scale=0.3, **options), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("window", "batch"), one_in(2, [0, 5], BATCHES))
def test_a_chunk_is_seen_from_inside_only(batch: str, window: int) -> None:
    case = make_case(BATCHES[batch], heads=4, kv_heads=2, stale=NAN, window=window, chunk=6)
    out = attention_native(*case.args, scale=0.3, sliding_window=window, chunk=6)
    expected = reference(case, scale=0.3, sliding_window=window, chunk=6)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("window", "batch"), one_in(3, [0, 5], BATCHES))
def test_biases_are_of_a_head_and_a_keys_position(batch: str, window: int) -> None:
    case = make_case(BATCHES[batch], heads=4, kv_heads=2, stale=NAN, window=window)
    options = {"sliding_window": window, "key_bias": torch.randn(4, 110) * 4}
    out = attention_native(*case.args, 0.3, **options)
    torch.testing.assert_close(out.double(), reference(case, scale=0.3, **options), atol=1e-5, rtol=1e-5)


@given(drawn_cases(dtypes=(torch.float32,)))
@settings(max_examples=20, deadline=None)
def test_equals_the_reference_whatever_the_batch(drawn: tuple[Case, dict[str, Any]]) -> None:
    case, options = drawn
    out = attention_native(*case.args, **options)
    torch.testing.assert_close(out.double(), reference(case, **options), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_sequences_rows_are_the_same_alone(batch: str) -> None:
    case = make_case(BATCHES[batch], heads=4, kv_heads=2, stale=NAN)
    query, key, value, cache, slots, tables, lens, starts, num_decode = case.args
    together = attention_native(*case.args, scale=0.3)
    for index in range(len(lens)):
        rows, one = slice(int(starts[index]), int(starts[index + 1])), slice(index, index + 1)
        num_new = rows.stop - rows.start
        alone = (tables[one], lens[one], torch.tensor([0, num_new]), num_new if index < num_decode else 0)
        out = attention_native(query[rows], key[rows], value[rows], cache, slots[rows], *alone, scale=0.3)
        torch.testing.assert_close(out, together[rows], atol=1e-6, rtol=1e-6)


def test_writing_and_attending_apart_are_the_op() -> None:
    case, twin = (make_case(BATCHES["mixed"], heads=4, kv_heads=2) for _ in range(2))
    query, key, value, cache, slots, *rest = case.args
    write_kv(key, value, cache, slots)
    written = cache.clone()
    assert torch.equal(attend(query, cache, *rest, 0.3), attention_native(*twin.args, 0.3))
    assert torch.equal(cache, written)


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
