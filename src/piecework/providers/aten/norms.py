"""Norms by `torch.rms_norm` and `torch.layer_norm`: one kernel each, but for RMS norm on a CPU, which torch composes.

They are inlined: in a piece that a compiler makes, Inductor writes them as it writes the native functions. They pay
where operators run one by one.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from piecework.ops.ir.values import flattened
from piecework.ops.norms import Norming, add_rms_norm, layer_norm, rms_norm

NAME: Final = "aten"


def register() -> None:
    """Register the implementations."""
    rms_norm.implement(NAME, supports=_rms_supports, inlined=True)(_rms_norm)
    add_rms_norm.implement(NAME, supports=_add_rms_supports, inlined=True)(_add_rms_norm)
    layer_norm.implement(NAME, supports=_layer_supports, inlined=True)(_layer_norm)


@flattened
def _rms_supports(x: Tensor, norming: Norming) -> bool | str:
    return _why_not(x, norming)


@flattened
def _add_rms_supports(x: Tensor, residual: Tensor, norming: Norming) -> bool | str:
    return _why_not(x, norming)


def _why_not(x: Tensor, norming: Norming) -> bool | str:
    weight = norming.weight
    if norming.offset and weight is not None:
        return f"torch.rms_norm adds nothing to the weight, the call {norming.offset}"
    if norming.round_first and weight is not None and x.dtype != torch.float32:
        return f"torch.rms_norm rounds after the weight, the call to {_name(x)} before it"
    return _same_dtypes(x, weight)


def _layer_supports(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> bool | str:
    return _same_dtypes(x, weight, bias)


def _same_dtypes(x: Tensor, *others: Tensor | None) -> bool | str:
    different = [other for other in others if other is not None and other.dtype != x.dtype]
    return f"a weight is {_name(different[0])}, the rows are {_name(x)}" if different else True


@flattened
def _rms_norm(x: Tensor, norming: Norming) -> Tensor:
    return torch.rms_norm(x, x.shape[-1:], norming.weight, norming.eps)


@flattened
def _add_rms_norm(x: Tensor, residual: Tensor, norming: Norming) -> tuple[Tensor, Tensor]:
    total = x + residual
    return torch.rms_norm(total, total.shape[-1:], norming.weight, norming.eps), total


def _layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
