"""Norms by `rmsnorm`, `gemma_rmsnorm`, `fused_add_rmsnorm`, `gemma_fused_add_rmsnorm` and `layernorm`.

The RMS norms round once, after the weight, and take float16 and bfloat16; Gemma's add 1 to the weight. With an addition
before it, the norm is of the sum as it was before it was rounded. `layernorm` takes bfloat16, with weight and bias in
float32.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from piecework.ops.norms import Norming, layer_norm
from piecework.providers.families.conditions import contiguous, first_of, of_one_type, of_types, on_device
from piecework.providers.families.norms import NormKernels, Rounding, implement_norms, rows

NAME = "flashinfer"


def why_not_norm(x: Tensor, norming: Norming, residual: Tensor | None) -> str:
    """Return why FlashInfer's RMS norms can't do a call, or ""; those of sgl-kernel are the same."""
    weight = norming.weight
    if weight is None:
        return "the kernel needs a weight"
    if norming.offset not in {0.0, 1.0}:
        return f"the kernels add nothing or 1 to the weight, the call {norming.offset}"
    return (
        on_device(("cuda",), x)
        or of_types((torch.bfloat16, torch.float16), x)
        or of_one_type(x, weight)
        or contiguous(x, residual, weight)
        or Rounding.LAST.conflict(x, norming)
    )


def norm_kernels(package: ModuleType) -> NormKernels:
    """Return the RMS norms of a package that has functions of FlashInfer's names and parameters."""

    def norm(x: Tensor, norming: Norming) -> Tensor:
        kernel = package.gemma_rmsnorm if norming.offset else package.rmsnorm
        made: Tensor = kernel(x, norming.weight, norming.eps)
        return made

    def add(x: Tensor, residual: Tensor, norming: Norming) -> None:
        kernel = package.gemma_fused_add_rmsnorm if norming.offset else package.fused_add_rmsnorm
        kernel(x, residual, norming.weight, norming.eps)

    return NormKernels(norm, add, why_not_norm)


def register(package: ModuleType) -> None:
    """Register the implementations."""
    implement_norms(NAME, norm_kernels(package))
    layernorm = getattr(getattr(package, "norm", None), "layernorm", None)
    if layernorm is None:
        return

    def supports(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> bool | str:
        if weight is None or bias is None:
            return "the kernel needs a weight and a bias"
        return first_of(
            on_device(("cuda",), x),
            of_types((torch.bfloat16,), x),
            of_types((torch.float32,), weight, bias),
            contiguous(x, weight, bias),
        )

    @layer_norm.implement(NAME, supports=supports)
    def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
        return layernorm(rows(x), weight, bias, eps).view(x.shape) if x.numel() else torch.empty_like(x)
