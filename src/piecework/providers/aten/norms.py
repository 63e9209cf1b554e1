"""Norms by `torch.rms_norm` and `torch.layer_norm`: one kernel each, but for RMS norm on a CPU, which torch composes.

They are inlined: in a piece that a compiler makes, Inductor writes them as it writes the native functions. They pay
where operators run one by one.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from piecework.ops.norms import add_rms_norm, layer_norm, rms_norm

NAME: Final = "aten"


def register() -> None:
    """Register the implementations."""
    rms_norm.implement(NAME, supports=_rms_supports, inlined=True)(_rms_norm)
    add_rms_norm.implement(NAME, supports=_add_rms_supports, inlined=True)(_add_rms_norm)
    layer_norm.implement(NAME, supports=_layer_supports, inlined=True)(_layer_norm)


def _rms_supports(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    round_first: bool = True,  # noqa: FBT001, FBT002  the op's
) -> bool | str:
    if offset and weight is not None:
        return f"torch.rms_norm adds nothing to the weight, the call {offset}"
    if round_first and weight is not None and x.dtype != torch.float32:
        return f"torch.rms_norm rounds after the weight, the call to {_name(x)} before it"
    return _same_dtypes(x, weight)


def _add_rms_supports(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    round_first: bool = True,  # noqa: FBT001, FBT002  the op's
) -> bool | str:
    return _rms_supports(x, weight, eps, offset, round_first)


def _layer_supports(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> bool | str:
    return _same_dtypes(x, weight, bias)


def _same_dtypes(x: Tensor, *others: Tensor | None) -> bool | str:
    different = [other for other in others if other is not None and other.dtype != x.dtype]
    return f"a weight is {_name(different[0])}, the rows are {_name(x)}" if different else True


def _rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    round_first: bool = True,  # noqa: FBT001, FBT002  the op's
) -> Tensor:
    return torch.rms_norm(x, x.shape[-1:], weight, eps)


def _add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    round_first: bool = True,  # noqa: FBT001, FBT002  the op's
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return torch.rms_norm(total, total.shape[-1:], weight, eps), total


def _layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
