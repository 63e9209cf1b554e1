# Kernels are in Triton's own language, which has no types for its arguments.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
"""Rotary embedding of tensors of any strides, one program per head and token; sums in float32 are rounded once."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from piecework.ops.rotary import rotary
from piecework.providers.triton.support import DTYPES, NAME, block_of, interpreted

_MOST_AXES: Final = 4


def register() -> None:
    """Register the implementation."""
    rotary.implement(NAME, supports=_supports, batch_invariant=True)(_rotary)


@triton.jit
def _rotary_kernel(
    x, cos, sin, out, inner, innermost, x0, x1, x2, cos0, cos1, cos2, out0, out1, out2,
    num_pairs, width, apart, second, block: tl.constexpr, rest: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i0, i1, i2 = row // (inner * innermost), row // innermost % inner, row % innermost
    x += i0 * x0 + i1 * x1 + i2 * x2
    out += i0 * out0 + i1 * out1 + i2 * out2
    angle = i0 * cos0 + i1 * cos1 + i2 * cos2
    pair = tl.arange(0, block)
    inside = pair < num_pairs
    at = pair * apart
    a = tl.load(x + at, mask=inside, other=0.0)
    b = tl.load(x + at + second, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + angle + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle + at, mask=inside, other=0.0).to(tl.float32)
    wide = a.to(tl.float32)
    tl.store(out + at, (wide * c - b * s).to(a.dtype), mask=inside)
    tl.store(out + at + second, (b * c + wide * s).to(a.dtype), mask=inside)
    if rest:
        left = 2 * num_pairs + tl.arange(0, rest)
        tl.store(out + left, tl.load(x + left, mask=left < width, other=0.0), mask=left < width)


def _supports(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,  # noqa: FBT001, FBT002  the op's
) -> bool | str:
    if not q.is_cuda and not interpreted():
        return f"the call is on {q.device.type}, Triton's kernels run on a GPU"
    for tensor in (q, k, cos, sin):
        if tensor.dtype not in DTYPES:
            return f"a tensor is {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.dim() > _MOST_AXES:
            return f"a tensor of {tensor.dim()} axes, more than {_MOST_AXES}"
        if tensor.stride(-1) != 1:
            return "a tensor whose rows are not contiguous"
    return True


def _rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,  # noqa: FBT001, FBT002  the op's
) -> tuple[Tensor, Tensor]:
    return _rotated(q, cos, sin, interleaved=interleaved), _rotated(k, cos, sin, interleaved=interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    size, width = cos.shape[-1], x.shape[-1]
    # strides as the op's: those of its arguments, but contiguous where a part of each head is put to the rotated one
    out = torch.empty_like(x) if size == width else x.new_empty(x.shape)
    if x.numel():
        ones = (1,) * (_MOST_AXES - x.dim())
        views = [t.reshape(ones + tuple(t.shape)) for t in (x, out)]
        angles = [t.expand(*views[0].shape[:-1], size) for t in (cos, sin)]
        assert angles[0].stride() == angles[1].stride(), "cosines and sines are made alike"
        strides = [stride for t in (views[0], angles[0], views[1]) for stride in t.stride()[:-1]]
        pairs = (2, 1) if interleaved else (1, size // 2)
        _rotary_kernel[(x.numel() // width,)](
            x, cos, sin, out, views[0].shape[1], views[0].shape[2], *strides, size // 2, width, *pairs,
            block=block_of(size // 2), rest=block_of(width - size) if size < width else 0,
        )  # fmt: skip
    return out
