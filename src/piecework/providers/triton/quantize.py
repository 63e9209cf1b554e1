# Kernels are in Triton's own language, which has no types for its arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
"""Quantization: with a given scale, and with one per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from piecework.ops.quantize import (
    FP8,
    LEAST_FP8_SCALE,
    LEAST_INT8_SCALE,
    most,
    quantize_dynamic_per_token,
    quantize_static_fp8,
)
from piecework.providers.triton.support import NAME, block_of, interpreted, num_rows, rows_supported


def register() -> None:
    """Register the implementations."""
    quantize_static_fp8.implement(NAME, supports=_static_supports, batch_invariant=True)(_static)
    quantize_dynamic_per_token.implement(NAME, supports=_per_token_supports, batch_invariant=True)(_per_token)


@triton.jit
def _kernel(
    x, out, scales, width, most, least, given: tl.constexpr, whole: tl.constexpr, block: tl.constexpr
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
    scaled = wide / scale
    if whole:
        # adding 1.5 * 2**23 and taking it away leaves a whole number, halves rounded to even
        scaled = (scaled + 12582912.0) - 12582912.0
    scaled = tl.minimum(tl.maximum(scaled, -most), most)
    tl.store(out + row * width + at, scaled.to(out.dtype.element_ty), mask=inside)


def _static_supports(x: Tensor, scale: Tensor) -> bool | str:
    return _fp8_supported() if interpreted() else rows_supported(x, scale)


def _per_token_supports(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> bool | str:
    return _fp8_supported() if interpreted() and dtype == FP8 else rows_supported(x)


def _fp8_supported() -> str:
    return "Triton's interpreter (3.7) halves values that round up to a power of two in fp8"


def _static(x: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    _launch(x, out, scale, given=True)
    return out


def _per_token(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    _launch(x, out, scales, given=False)
    return out, scales


def _launch(x: Tensor, out: Tensor, scales: Tensor, *, given: bool) -> None:
    rows, width = num_rows(x), x.shape[-1]
    if rows:
        whole = not out.dtype.is_floating_point
        least = LEAST_INT8_SCALE if whole else LEAST_FP8_SCALE
        _kernel[(rows,)](x, out, scales, width, most(out.dtype), least, given=given, whole=whole, block=block_of(width))
