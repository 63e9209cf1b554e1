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

from piecework.ops.rotary import rotary, rotate_pairs
from piecework.providers.triton.support import DTYPES, NAME, block_of, interpreted

_MOST_AXES: Final = 4


def register() -> None:
    """Register the implementations."""
    rotary.implement(NAME, supports=_supports, batch_invariant=True)(_rotary)
    rotate_pairs.implement(NAME, supports=_pairs_support, batch_invariant=True)(_rotate_pairs)


@triton.jit
def _rotary_kernel(
    x, cos, sin, out, inner, innermost, x0, x1, x2, cos0, cos1, cos2, out0, out1, out2,
    num_pairs, width, apart, second, angle_apart, out_apart, out_second, block: tl.constexpr, rest: tl.constexpr,
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
    c = tl.load(cos + angle + pair * angle_apart, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle + pair * angle_apart, mask=inside, other=0.0).to(tl.float32)
    wide = a.to(tl.float32)
    tl.store(out + pair * out_apart, (wide * c - b * s).to(a.dtype), mask=inside)
    tl.store(out + pair * out_apart + out_second, (b * c + wide * s).to(a.dtype), mask=inside)
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
    return _supported(q, k, cos, sin)


def _pairs_support(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,  # noqa: FBT001, FBT002  the op's
) -> bool | str:
    return _supported(x, cos, sin)


def _supported(*tensors: Tensor) -> bool | str:
    if not tensors[0].is_cuda and not interpreted():
        return f"the call is on {tensors[0].device.type}, Triton's kernels run on a GPU"
    for tensor in tensors:
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
    num_pairs = cos.shape[-1] // 2
    places = (2, 1) if interleaved else (1, num_pairs)
    made = []
    for x in (q, k):
        # strides as the op's: those of its arguments, but contiguous where the rest of a head is put beside
        out = torch.empty_like(x) if cos.shape[-1] == x.shape[-1] else x.new_empty(x.shape)
        made.append(_launch(x, cos, sin, out, num_pairs=num_pairs, read=places, angle_apart=places[0], written=places))
    return made[0], made[1]


def _rotate_pairs(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,  # noqa: FBT001, FBT002  the op's
) -> Tensor:
    half = x.shape[-1] // 2
    read = (2, 1) if interleaved else (1, half)
    out = x.new_empty(x.shape)
    return _launch(x, cos, sin, out, num_pairs=half, read=read, angle_apart=1, written=(1, half))


def _launch(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    *,
    num_pairs: int,
    read: tuple[int, int],
    angle_apart: int,
    written: tuple[int, int],
) -> Tensor:
    """Write x, rotated, to `out`, and return that.

    Args:
        x, cos, sin, out: the op's; cosines are broadcast.
        num_pairs: of a row; elements after them stay as they are.
        read, written: how far pairs are apart, and their second elements from the first, in x and in `out`.
        angle_apart: how far the cosines of two pairs are apart.
    """
    if x.numel():
        ones = (1,) * (_MOST_AXES - x.dim())
        wide, made = (t.reshape(ones + tuple(t.shape)) for t in (x, out))
        angles = [t.expand(*wide.shape[:-1], t.shape[-1]) for t in (cos, sin)]
        assert angles[0].stride() == angles[1].stride(), "cosines and sines are made alike"
        strides = [stride for t in (wide, angles[0], made) for stride in t.stride()[:-1]]
        width = x.shape[-1]
        left = width - 2 * num_pairs
        _rotary_kernel[(x.numel() // width,)](
            x, cos, sin, out, wide.shape[1], wide.shape[2], *strides, num_pairs, width, *read, angle_apart, *written,
            block=block_of(num_pairs), rest=block_of(left) if left else 0,
        )  # fmt: skip
    return out
