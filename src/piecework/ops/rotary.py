"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), for cosines and sines that are given.

How positions become angles (linear, dynamic, yarn, longrope, llama3 …) is decided where cosines and sines are made; all
of these types apply them in one of two ways: to halves of a head (GPT-NeoX, Llama), or to pairs of neighbours (GPT-J).

Shape suffixes: D head dim, R rotated part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from piecework.ops.ir.inputs import Draw
from piecework.ops.ir.op import op


def _inputs(draw: Draw) -> Sequence[Any]:
    tokens, dim = draw.rows, draw.choose((16, 64, 2, 80))
    rotated = draw.choose((dim, dim, dim // 2 if dim % 4 == 0 else dim))
    pairs = draw.choose((False, True, True, False, False))  # as many as no other choice has: all combinations come
    angles = draw.tensor(tokens, rotated // 2, scale=10.0, dtype=torch.float32)
    full = angles.repeat_interleave(2, dim=-1) if pairs else torch.cat([angles, angles], dim=-1)
    dtype = draw.choose((draw.dtype, torch.float32))
    heads = draw.choose((4, 1, 3))
    # transposed, as attention layers have them
    q, k = (draw.tensor(1, tokens, n, dim).transpose(1, 2) for n in (heads, 1))
    return q, k, full.cos().to(dtype), full.sin().to(dtype), pairs


@op("piecework::rotary", inputs=_inputs, tolerance={torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3})
def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,  # noqa: FBT001, FBT002  an operator's argument
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys.

    Args:
        q, k: [..., D], float32 | bfloat16 | float16; the numbers of heads may differ.
        cos, sin: [..., R], R even and at most D, broadcast against q's and k's other axes; R smaller than D leaves the
            rest of a head as it is. Scaled where the rotary type scales. With a wider dtype than q's and k's the
            arithmetic is in that.
        interleaved: False rotates element i with element i + R/2, so that the angles come twice one after the other;
            True rotates elements 2i and 2i + 1, and each angle comes twice in a row.

    Returns:
        q and k rotated, in their dtype.
    """
    return _rotated(q, cos, sin, interleaved=interleaved), _rotated(k, cos, sin, interleaved=interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    size, pair = cos.shape[-1], (-1, 2) if interleaved else (2, -1)
    if size != x.shape[-1]:
        return torch.cat((_rotated_whole(x[..., :size], cos, sin, pair=pair), x[..., size:]), dim=-1)
    if _is_transposed(x):
        # a compiler writes results in the order of the axes that they are computed over
        in_order = [t[(None,) * (4 - t.ndim)].transpose(1, 2) for t in (x, cos, sin)]
        return _rotated_whole(*in_order, pair=pair).transpose(1, 2)
    return _rotated_whole(x, cos, sin, pair=pair)


def _is_transposed(x: Tensor) -> bool:
    """Whether x is [batch, heads, tokens, D] of what lies in memory as [batch, tokens, heads, D]."""
    inner, outer = (x.stride(1), x.stride(2)) if x.ndim == 4 else (0, 0)
    return isinstance(inner, int) and isinstance(outer, int) and inner < outer


def _rotated_whole(x: Tensor, cos: Tensor, sin: Tensor, *, pair: tuple[int, int]) -> Tensor:
    """Rotate x, whose last axis is the two axes `pair`; that of length 2 has the elements of a pair.

    Each element is multiplied with its cosine, and the pair's other one with the sine, of which the first element gets
    the negative. Nothing is put together of parts, so that a compiler has no reason to write parts to memory.
    """
    axis = pair.index(2) - 2
    first = (torch.arange(2, device=x.device) == 0).view([2 if n == 2 else 1 for n in pair])
    x, cos, sin = (tensor.unflatten(-1, pair) for tensor in (x, cos, sin))
    made = x * cos + x.flip(axis) * torch.where(first, -sin, sin)
    return made.flatten(-2).to(x.dtype)


def _pair_inputs(draw: Draw) -> Sequence[Any]:
    tokens, dim = draw.rows, draw.choose((16, 64, 2, 80))
    angles = draw.tensor(tokens, 1, dim // 2, scale=10.0, dtype=torch.float32)
    dtype = draw.choose((draw.dtype, torch.float32))
    heads = draw.choose((4, 1, 3))
    x = draw.tensor(tokens, heads, dim + 8)[..., 8:]  # a part of each head, as latent attention has them
    return x, angles.cos().to(dtype), angles.sin().to(dtype), draw.choose((False, True, True, False, False))


@op(
    "piecework::rotate_pairs",
    inputs=_pair_inputs,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3},
)
def rotate_pairs(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,  # noqa: FBT001, FBT002  an operator's argument
) -> Tensor:
    """Rotate one tensor by angles that are given once for each pair.

    Args:
        x: [..., R], R even, float32 | bfloat16 | float16.
        cos, sin: [..., R / 2], broadcast against x's other axes. With a wider dtype than x's the arithmetic is in that.
        interleaved: where a pair is in x: False for i and i + R/2, True for 2i and 2i + 1 (DeepSeek).

    Returns:
        [..., R], dtype of x: the first elements of all pairs, and then the second ones.
    """
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
