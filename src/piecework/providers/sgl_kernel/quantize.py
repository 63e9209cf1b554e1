"""Quantization to fp8 with a given scale (`sgl_per_tensor_quant_fp8`) and by groups of 128.

Groups are `sgl_per_token_group_quant_8bit`, or `sgl_per_token_group_quant_fp8` in older versions. Kernels multiply with
the inverse of a scale where the op divides: a value between two steps may get the other one.
"""

from __future__ import annotations

import inspect
from types import ModuleType

import torch
from torch import Tensor

from piecework.ops.quantize import FP8, LEAST_MAGNITUDE, most, quantize_group_fp8, quantize_static_fp8
from piecework.providers.families.conditions import contiguous, first_of, of_types, on_device
from piecework.providers.families.norms import rows

NAME = "sgl_kernel"
_GROUP = 128


def register(package: ModuleType) -> None:
    """Register the implementations that this version has kernels for."""
    static = getattr(package, "sgl_per_tensor_quant_fp8", None)
    if static is not None:
        _register_static(package)
    for name in ("sgl_per_token_group_quant_8bit", "sgl_per_token_group_quant_fp8"):
        if hasattr(package, name):
            _register_group(package, name)
            break


def _register_static(package: ModuleType) -> None:
    def supports(x: Tensor, scale: Tensor) -> bool | str:
        return first_of(
            on_device(("cuda",), x),
            of_types((torch.float32, torch.bfloat16, torch.float16), x),
            contiguous(x, scale),
        )

    @quantize_static_fp8.implement(NAME, supports=supports, batch_invariant=True)
    def static(x: Tensor, scale: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=FP8, device=x.device)
        if x.numel():
            package.sgl_per_tensor_quant_fp8(rows(x), rows(out), scale, is_static=True)
        return out


def _register_group(package: ModuleType, name: str) -> None:
    quantize = getattr(package, name)
    # the second version of the kernel is chosen by SGLang's own settings, which needn't be installed
    options = {"enable_v2": False} if "enable_v2" in inspect.signature(quantize).parameters else {}

    def supports(x: Tensor, group_size: int = 128) -> bool | str:
        other = "" if group_size == _GROUP else f"groups of {group_size}, the kernel has {_GROUP}"
        return first_of(on_device(("cuda",), x), of_types((torch.bfloat16, torch.float16), x), other, contiguous(x))

    @quantize_group_fp8.implement(NAME, supports=supports, batch_invariant=True)
    def group(x: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
        out = torch.empty(x.shape, dtype=FP8, device=x.device)
        scale = torch.empty((*x.shape[:-1], x.shape[-1] // group_size), dtype=torch.float32, device=x.device)
        if x.numel():
            limits = LEAST_MAGNITUDE, -most(FP8), most(FP8)
            quantize(rows(x), rows(out), rows(scale), group_size, *limits, scale_ue8m0=False, **options)
        return out, scale
