# Kernels are in Triton's own language, which has no types for its arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
"""Quantization: with a given scale, with one per row, and with one per group of a row; one program per row.

Triton's interpreter (3.9) halves values that round up to a power of two in fp8. So under it, values are first made such
that the cast changes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from piecework.ops.quantize import (
    FP8,
    LEAST_FP8_SCALE,
    LEAST_INT8_SCALE,
    LEAST_MAGNITUDE,
    most,
    quantize_dynamic_per_token,
    quantize_group_fp8,
    quantize_static_fp8,
)
from piecework.providers.triton.support import NAME, block_of, interpreted, num_rows, rows_supported


def register() -> None:
    """Register the implementations."""
    quantize_static_fp8.implement(NAME, supports=_static_supports, batch_invariant=True)(_static)
    quantize_dynamic_per_token.implement(NAME, supports=_per_token_supports, batch_invariant=True)(_per_token)
    quantize_group_fp8.implement(NAME, supports=_group_supports, batch_invariant=True)(_group)


@triton.jit
def _to_even(values):
    # adding 1.5 * 2**23 and taking it away leaves a whole number, halves rounded to even
    return (values + 12582912.0) - 12582912.0


@triton.jit
def _to_fp8_steps(values):
    # three bits of the mantissa, and steps of 2**-9 below 2**-6
    power = (values.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(power * 0.125, 0.001953125)
    return _to_even(values / step) * step


@triton.jit
def _rounded(values, most, whole: tl.constexpr, stepwise: tl.constexpr):
    if whole:
        values = _to_even(values)
    values = tl.minimum(tl.maximum(values, -most), most)
    if stepwise:
        values = _to_fp8_steps(values)
    return values


@triton.jit
def _row_kernel(
    x, out, scales, width, most, least,
    given: tl.constexpr, whole: tl.constexpr, stepwise: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    wide = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if given:
        scale = tl.load(scales)
    else:
        scale = tl.maximum(tl.max(tl.abs(wide), axis=0) / most, least)
        tl.store(scales + row, scale)
    made = _rounded(wide / scale, most, whole=whole, stepwise=stepwise)
    tl.store(out + row * width + at, made.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _group_kernel(
    x, out, scales, groups, size, most, least,
    stepwise: tl.constexpr, group_block: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, group_block)
    at = tl.arange(0, block)
    inside = (group[:, None] < groups) & (at[None, :] < size)
    places = row * groups * size + group[:, None] * size + at[None, :]
    wide = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), axis=1), least) / most
    tl.store(scales + row * groups + group, scale, mask=group < groups)
    made = _rounded(wide / scale[:, None], most, whole=False, stepwise=stepwise)
    tl.store(out + places, made.to(out.dtype.element_ty), mask=inside)


def _static_supports(x: Tensor, scale: Tensor) -> bool | str:
    return rows_supported(x, scale)


def _per_token_supports(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> bool | str:
    return rows_supported(x)


def _group_supports(x: Tensor, group_size: int = 128) -> bool | str:
    return rows_supported(x)


def _static(x: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    _launch(x, out, scale, given=True)
    return out


def _per_token(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    _launch(x, out, scales, given=False)
    return out, scales


def _group(x: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
    groups = x.shape[-1] // group_size
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = torch.empty((*x.shape[:-1], groups), dtype=torch.float32, device=x.device)
    rows = num_rows(x)
    if rows:
        _group_kernel[(rows,)](
            x, out, scales, groups, group_size, most(FP8), LEAST_MAGNITUDE,
            stepwise=interpreted(), group_block=block_of(groups), block=block_of(group_size),
        )  # fmt: skip
    return out, scales


def _launch(x: Tensor, out: Tensor, scales: Tensor, *, given: bool) -> None:
    rows, width = num_rows(x), x.shape[-1]
    if rows:
        whole = not out.dtype.is_floating_point
        _row_kernel[(rows,)](
            x, out, scales, width, most(out.dtype), LEAST_INT8_SCALE if whole else LEAST_FP8_SCALE,
            given=given, whole=whole, stepwise=interpreted() and not whole, block=block_of(width),
        )  # fmt: skip
