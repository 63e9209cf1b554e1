# Kernels are in Triton's own language, which has no types for its arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
"""RMS norm, with and without the addition before it, and layer norm: a row is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from piecework.ops.ir.values import flattened
from piecework.ops.norms import Norming, add_rms_norm, layer_norm, rms_norm
from piecework.providers.triton.support import NAME, block_of, num_rows, rows_supported


def register() -> None:
    """Register the implementations."""
    rms_norm.implement(NAME, supports=_rms_supports, batch_invariant=True)(_rms_norm)
    add_rms_norm.implement(NAME, supports=_add_supports, batch_invariant=True)(_add_rms_norm)
    layer_norm.implement(NAME, supports=_layer_supports, batch_invariant=True)(_layer_norm)


@triton.jit
def _rms_kernel(
    x, residual, weight, out, total, width, eps, offset,
    adds: tl.constexpr, weighted: tl.constexpr, round_first: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, block)
    inside = at < width
    row = tl.load(x + start + at, mask=inside, other=0.0)
    kind = row.dtype
    if adds:
        row = (row.to(tl.float32) + tl.load(residual + start + at, mask=inside, other=0.0).to(tl.float32)).to(kind)
        tl.store(total + start + at, row, mask=inside)
    wide = row.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    if weighted:
        factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + offset
        if round_first:
            normed = normed.to(kind).to(tl.float32)
        normed = normed * factor
    tl.store(out + start + at, normed.to(kind), mask=inside)


@triton.jit
def _layer_kernel(
    x, weight, bias, out, width, eps, weighted: tl.constexpr, biased: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, block)
    inside = at < width
    row = tl.load(x + start + at, mask=inside, other=0.0)
    wide = row.to(tl.float32)
    centred = tl.where(inside, wide - tl.sum(wide, axis=0) / width, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    if weighted:
        normed = normed * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if biased:
        normed = normed + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + at, normed.to(row.dtype), mask=inside)


@flattened
def _rms_supports(x: Tensor, norming: Norming) -> bool | str:
    return rows_supported(x, norming.weight)


@flattened
def _add_supports(x: Tensor, residual: Tensor, norming: Norming) -> bool | str:
    return rows_supported(x, residual, norming.weight)


def _layer_supports(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> bool | str:
    return rows_supported(x, weight, bias)


@flattened
def _rms_norm(x: Tensor, norming: Norming) -> Tensor:
    out = torch.empty_like(x)
    _launch(x, None, norming, out, out)
    return out


@flattened
def _add_rms_norm(x: Tensor, residual: Tensor, norming: Norming) -> tuple[Tensor, Tensor]:
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual, norming, out, total)
    return out, total


def _launch(x: Tensor, residual: Tensor | None, norming: Norming, out: Tensor, total: Tensor) -> None:
    weight, eps, offset, round_first = norming
    rows, width = num_rows(x), x.shape[-1]
    if rows:
        _rms_kernel[(rows,)](
            x, x if residual is None else residual, x if weight is None else weight, out, total, width, eps, offset,
            adds=residual is not None, weighted=weight is not None, round_first=round_first, block=block_of(width),
        )  # fmt: skip


def _layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    out = torch.empty_like(x)
    rows, width = num_rows(x), x.shape[-1]
    if rows:
        _layer_kernel[(rows,)](
            x, x if weight is None else weight, x if bias is None else bias, out, width, eps,
            weighted=weight is not None, biased=bias is not None, block=block_of(width),
        )  # fmt: skip
    return out
