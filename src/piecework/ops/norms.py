"""Norms over the last axis: `rms_norm`, `add_rms_norm`, `layer_norm`.

RMS norm: Zhang and Sennrich 2019, arXiv:1910.07467. Layer norm: Ba et al. 2016, arXiv:1607.06450.

Shape suffix: H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from piecework.ops.ir.inputs import Draw
from piecework.ops.ir.op import op

TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def _norm_inputs(draw: Draw) -> Sequence[Any]:
    width = draw.width()
    weight = draw.choose((draw.tensor(width), None, draw.tensor(width)))
    x = draw.choose((draw.tensor(draw.rows, width), draw.tensor(1, draw.rows, 2, width, scale=30.0)))
    return x, weight, draw.choose((1e-6, 1e-5)), draw.choose((0.0, 0.0, 1.0, 0.0)), draw.choose((True, True, False))


def _add_inputs(draw: Draw) -> Sequence[Any]:
    x, weight, eps, offset, round_first = _norm_inputs(draw)
    return x, draw.tensor(*x.shape), weight, eps, offset, round_first


def _layer_norm_inputs(draw: Draw) -> Sequence[Any]:
    width = draw.width()
    weight, bias = draw.choose(
        ((draw.tensor(width), draw.tensor(width)), (draw.tensor(width), None), (None, draw.tensor(width)), (None, None))
    )
    return draw.tensor(draw.rows, 3, width) + 1, weight, bias, 1e-5


class Norming(NamedTuple):
    """What `rms_norm` takes besides rows: what implementations of it and of `add_rms_norm` are given, `flattened`."""

    weight: Tensor | None = None
    eps: float = 1e-6
    offset: float = 0.0
    round_first: bool = True


@op("piecework::rms_norm", inputs=_norm_inputs, tolerance=TOLERANCE)
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    round_first: bool = True,  # noqa: FBT001, FBT002  an operator's argument
) -> Tensor:
    """Divide each row by its root mean square, in float32, and multiply it with the weight.

    Args:
        x: [..., H], float32 | bfloat16 | float16.
        weight: [H], any float dtype, or None.
        eps: added to the mean square.
        offset: added to the weight (1.0 for Gemma's, which are stored around 0).
        round_first: whether the row is rounded to x's dtype before it is multiplied (Llama), or after (Gemma).

    Returns:
        [..., H], dtype of x.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if round_first:
        normed = normed.to(x.dtype)
    factor = weight if round_first else weight.float()
    return (normed * (factor + offset if offset else factor)).to(x.dtype)


@op("piecework::add_rms_norm", inputs=_add_inputs, tolerance=TOLERANCE)
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    round_first: bool = True,  # noqa: FBT001, FBT002  an operator's argument
) -> tuple[Tensor, Tensor]:
    """Add the residual, and norm the sum.

    Args:
        x: [..., H], float32 | bfloat16 | float16.
        residual: shape and dtype of x.
        weight, eps, offset, round_first: see `rms_norm`.

    Returns:
        the norm of the sum and the sum, which is the next residual; both shape and dtype of x.
    """
    total = x + residual
    return rms_norm.native(total, weight, eps, offset, round_first), total


@op("piecework::layer_norm", inputs=_layer_norm_inputs, tolerance=TOLERANCE)
def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Bring each row to mean 0 and variance 1 in float32, and apply weight and bias.

    Args:
        x: [..., H], float32 | bfloat16 | float16.
        weight, bias: [H], or None.
        eps: added to the variance.

    Returns:
        [..., H], dtype of x.
    """
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.float()
    if bias is not None:
        normed = normed + bias.float()
    return normed.to(x.dtype)
