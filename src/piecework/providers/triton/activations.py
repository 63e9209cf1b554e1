# Kernels are in Triton's own language, which has no types for its arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
"""Gated activations. Halves of one tensor, as a merged linear layer leaves them, are read where they are."""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from piecework.ops.activations import gelu_mul, silu_mul
from piecework.providers.triton.support import DTYPES, NAME, interpreted

_BLOCK: Final = 1024


def register() -> None:
    """Register the implementations."""
    silu_mul.implement(NAME, supports=_silu_supports, batch_invariant=True)(_silu_mul)
    gelu_mul.implement(NAME, supports=_gelu_supports, batch_invariant=True)(_gelu_mul)


@triton.jit
def _gated_kernel(
    gate, up, out, width, gate_stride, up_stride, silu: tl.constexpr, exact: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    given = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0)
    other = tl.load(up + row * up_stride + at, mask=inside, other=0.0)
    x = given.to(tl.float32)
    if silu:
        active = x * tl.sigmoid(x)
    elif exact:
        active = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # tanh(y) = 2 sigmoid(2y) - 1
        active = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    product = active.to(given.dtype).to(tl.float32) * other.to(tl.float32)
    tl.store(out + row * width + at, product.to(given.dtype), mask=inside)


def _silu_supports(gate: Tensor, up: Tensor) -> bool | str:
    if not gate.is_cuda and not interpreted():
        return f"the call is on {gate.device.type}, Triton's kernels run on a GPU"
    if gate.dtype not in DTYPES or up.dtype != gate.dtype:
        return "a tensor is of another type than float32, bfloat16 and float16, or of another than the other"
    return all(map(_is_rows, (gate, up))) or "a tensor whose rows are not evenly spaced"


def _gelu_supports(gate: Tensor, up: Tensor, approximate: str = "none") -> bool | str:
    return _silu_supports(gate, up)


def _is_rows(x: Tensor) -> bool:
    """Whether rows are contiguous and all as far apart, so that one stride leads from each to the next."""
    stride = x.stride()
    even = all(stride[i] == stride[i + 1] * x.shape[i + 1] for i in range(x.dim() - 2))
    return stride[-1] == 1 and even


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return _gated(gate, up, silu=True, exact=False)


def _gelu_mul(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    return _gated(gate, up, silu=False, exact=approximate == "none")


def _gated(gate: Tensor, up: Tensor, *, silu: bool, exact: bool) -> Tensor:
    out = gate.new_empty(gate.shape)
    width = gate.shape[-1]
    if gate.numel():
        grid = (gate.numel() // width, triton.cdiv(width, _BLOCK))
        strides = [x.stride(-2) if x.dim() > 1 else width for x in (gate, up)]
        _gated_kernel[grid](gate, up, out, width, *strides, silu=silu, exact=exact, block=_BLOCK)
    return out
