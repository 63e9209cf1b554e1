"""Generated: every op × implementation × shapes (no rows, one, odd sizes) × dtype, against the native function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from piecework.ops.catalogue import CHOSEN, VIEWS, kv_write, running
from piecework.ops.ir.op import IrOp
from piecework.ops.ir.provider_order import IR_OPS
from piecework.providers.discovery import load_providers
from tests.unit.ops.ir_cases import SEEDS, assert_close

load_providers(["aten"])
IMPLEMENTATIONS = [(op, provider) for op in CHOSEN for provider in op.implementations if provider != "triton"]


def _name(value: Any) -> str:
    return value.short_name if isinstance(value, IrOp) else str(value).removeprefix("torch.")


def test_orders_of_providers_know_every_op() -> None:
    assert [op.short_name for op in CHOSEN] == list(IR_OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=_name)
@pytest.mark.parametrize(("op", "provider"), IMPLEMENTATIONS, ids=_name)
def test_implementations_agree_with_the_native_function(op: IrOp, provider: str, dtype: torch.dtype) -> None:
    implementation = op.implementations[provider]
    compared = 0
    for seed in SEEDS:
        args = op.make_inputs(seed, dtype=dtype)
        expected = op.native(*args)
        if implementation.supports is not None and implementation.supports(*args) is not True:
            continue
        compared += 1
        assert_close(op, op.check(*args, provider=provider), expected, dtype=dtype)
    assert compared, "no case that it supports"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=_name)
@pytest.mark.parametrize("op", [*CHOSEN, *VIEWS], ids=_name)
def test_the_operator_does_what_it_declares(op: IrOp, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        args = op.make_inputs(seed, dtype=dtype)
        with running(op, args):
            op.check(*args)


@pytest.mark.parametrize("op", [op for op in CHOSEN if not op.short_name.startswith(("quantize", "moe"))], ids=_name)
def test_narrow_types_are_as_close_to_float32_as_their_rounding(op: IrOp) -> None:
    for seed in SEEDS:
        args = op.make_inputs(seed, dtype=torch.bfloat16)
        wide = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
        found, exact = (r if isinstance(r, tuple) else (r,) for r in (op.native(*args), op.native(*wide)))
        for a, b in zip(found, exact, strict=True):
            assert a.dtype == torch.bfloat16
            torch.testing.assert_close(a.float(), b, atol=4e-2, rtol=4e-2)


@pytest.mark.parametrize("op", [*CHOSEN, *VIEWS], ids=_name)
def test_opcheck(op: IrOp) -> None:
    for seed in (0, 1, 4):
        args = op.make_inputs(seed, dtype=torch.float32)
        with running(op, args):
            torch.library.opcheck(op.overload, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=_name)
def test_kv_write_fills_the_batchs_slots_of_the_layers_cache(dtype: torch.dtype) -> None:
    for seed in SEEDS:
        key, value, layer = args = kv_write.make_inputs(seed, dtype=dtype)
        with running(kv_write, args) as context:
            token = kv_write(*args)
            cache, slots = context.layer(layer).kv_cache, context.batch.slot_mapping
        assert (token.shape, token.dtype) == ((0,), dtype)
        for stored, given in zip(cache.flatten(1, 2), (key, value), strict=True):
            assert torch.equal(stored[slots], given)
            assert not stored[[i for i in range(len(stored)) if i not in slots]].any()


@pytest.mark.parametrize("op", CHOSEN, ids=_name)
def test_cases_differ_in_shapes_and_repeat(op: IrOp) -> None:
    shapes = {tuple(a.shape for a in op.make_inputs(s, dtype=torch.float32) if hasattr(a, "shape")) for s in SEEDS}
    assert len(shapes) >= 6
    assert any(0 in shape for case in shapes for shape in case)
    for a, b in zip(*(op.make_inputs(3, dtype=torch.float32) for _ in range(2)), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
