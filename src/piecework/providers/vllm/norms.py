"""RMS norms by `_C::rms_norm` and `_C::fused_add_rms_norm`.

When the CUDA kernels round has changed with versions, and back (vllm-project/vllm issue 42325), so the kernels
themselves are asked, with one row. On CPUs the sum's own rounding is not in the variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from piecework.ops.norms import Norming
from piecework.providers.families.conditions import contiguous, multiple, of_one_type, of_types, on_device
from piecework.providers.families.norms import NormKernels, Rounding, implement_norms, probe
from piecework.providers.vllm.library import NAME, Operators

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register(operators: Operators) -> None:
    """Register the implementations."""
    device = operators.device
    rms_norm = operators.find("_C::rms_norm")
    fused_add_rms_norm = operators.find("_C::fused_add_rms_norm")
    if rms_norm is None or fused_add_rms_norm is None:
        return

    def norm(x: Tensor, norming: Norming) -> Tensor:
        out = torch.empty_like(x)
        rms_norm(out, x, norming.weight, norming.eps)
        return out

    def add(x: Tensor, residual: Tensor, norming: Norming) -> None:
        fused_add_rms_norm(x, residual, norming.weight, norming.eps)

    def norm_of_sum(x: Tensor, weight: Tensor) -> Tensor:
        fused_add_rms_norm(x, torch.zeros_like(x), weight, 1e-6)
        return x

    usable = device == "cpu" or torch.cuda.is_available()
    rounding = probe(lambda x, w: norm(x, Norming(w)), device=device) if usable else Rounding.OTHER
    rounding_of_sum = probe(norm_of_sum, device=device) if usable else Rounding.OTHER
    weight_optional = operators.parameters("_C::rms_norm")["weight"].text.startswith("Tensor?")

    def why_not(x: Tensor, norming: Norming, residual: Tensor | None) -> str:
        weight = norming.weight
        if norming.offset and weight is not None:
            return f"the kernel adds nothing to the weight, the call {norming.offset}"
        if weight is None and not weight_optional:
            return "this version's kernel needs a weight"
        when = rounding if residual is None else rounding_of_sum
        return (
            on_device((device,), x)
            or of_types(_DTYPES, x)
            or of_one_type(x, weight)
            or contiguous(x, residual, weight)
            or (multiple(x.shape[-1], 8) if device == "cpu" else "")
            or when.conflict(x, norming)
        )

    implement_norms(NAME, NormKernels(norm, add, why_not, batch_invariant=device == "cpu"))
