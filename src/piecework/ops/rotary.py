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

from piecework.ops.ir import op
from piecework.ops.ir_inputs import Draw


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
    size = cos.shape[-1]
    part = x if size == x.shape[-1] else x[..., :size]
    if interleaved:
        even, odd = part.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    else:
        first, second = part.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    made = (part * cos + turned * sin).to(x.dtype)
    return made if size == x.shape[-1] else torch.cat((made, x[..., size:]), dim=-1)


def _pair_inputs(draw: Draw) -> Sequence[Any]:
    tokens, dim = draw.rows, draw.choose((16, 64, 2, 80))
    angles = draw.tensor(tokens, 1, dim // 2, scale=10.0, dtype=torch.float32)
    dtype = draw.choose((draw.dtype, torch.float32))
    heads = draw.choose((4, 1, 3))
    x = draw.tensor(tokens, heads, dim + 8)[..., 8:]  # a part of each head, as latent attention has them
    return x, angles.cos().to(dtype), angles.sin().to(dtype), draw.choose((False, True))


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
