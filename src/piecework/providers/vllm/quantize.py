"""Quantization to fp8 with a given scale, to fp8 and int8 with one per row, and to fp8 by groups.

By `_C::static_scaled_fp8_quant`, `_C::dynamic_per_token_scaled_fp8_quant`, `_C::dynamic_scaled_int8_quant` and
`_C::per_token_group_fp8_quant`. Some multiply with the inverse of a scale where the op divides: a value between two
steps may get the other one. On AMD GPUs they make float8_e4m3fnuz, which the ops don't.
"""

from __future__ import annotations

import torch
from torch import Tensor

from piecework.ops.quantize import (
    FP8,
    LEAST_MAGNITUDE,
    most,
    quantize_dynamic_per_token,
    quantize_group_fp8,
    quantize_static_fp8,
)
from piecework.providers.families.conditions import contiguous, first_of, name_of, of_types, on_device
from piecework.providers.families.norms import rows
from piecework.providers.vllm.library import NAME, Operators

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register(operators: Operators) -> None:
    """Register the implementations."""
    _register_static(operators)
    _register_per_token(operators)
    _register_group(operators)


def _why_not(operators: Operators, x: Tensor, *others: Tensor) -> str:
    if torch.version.hip is not None:
        return "vLLM's fp8 on AMD GPUs is another type"
    return on_device((operators.device,), x) or of_types(_DTYPES, x) or contiguous(x, *others)


def _register_static(operators: Operators) -> None:
    quantize = operators.find("_C::static_scaled_fp8_quant")
    if quantize is None:
        return

    def supports(x: Tensor, scale: Tensor) -> bool | str:
        return first_of(_why_not(operators, x, scale))

    @quantize_static_fp8.implement(NAME, supports=supports, batch_invariant=True)
    def static(x: Tensor, scale: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=FP8, device=x.device)
        if x.numel():
            quantize(rows(out), rows(x), scale)
        return out


def _register_per_token(operators: Operators) -> None:
    to_fp8 = operators.find("_C::dynamic_per_token_scaled_fp8_quant")
    to_int8 = operators.find("_C::dynamic_scaled_int8_quant")
    kernels = {dtype: kernel for dtype, kernel in ((FP8, to_fp8), (torch.int8, to_int8)) if kernel is not None}
    if not kernels:
        return

    def supports(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> bool | str:
        missing = "" if dtype in kernels else f"this build of vLLM quantizes to no {name_of(dtype)}"
        return first_of(missing, _why_not(operators, x))

    @quantize_dynamic_per_token.implement(NAME, supports=supports, batch_invariant=True)
    def per_token(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
        if x.numel():
            kernels[dtype](rows(out), rows(x), rows(scale), None)  # no bound of the scale, no zero point
        return out, scale


def _register_group(operators: Operators) -> None:
    name = "_C::per_token_group_fp8_quant"
    quantize = operators.find(name)
    if quantize is None:
        return
    # later versions ask for the scales' layout as well; always by rows, and no powers of two
    plain = [False] * (len(operators.parameters(name)) - 7)

    def supports(x: Tensor, group_size: int = 128) -> bool | str:
        odd = "" if group_size % 16 == 0 else f"groups of {group_size}, not a multiple of 16"
        return first_of(_why_not(operators, x), odd)

    @quantize_group_fp8.implement(NAME, supports=supports, batch_invariant=True)
    def group(x: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
        out = torch.empty(x.shape, dtype=FP8, device=x.device)
        scale = torch.empty((*x.shape[:-1], x.shape[-1] // group_size), dtype=torch.float32, device=x.device)
        if x.numel():
            least = LEAST_MAGNITUDE
            quantize(rows(x), rows(out), rows(scale), group_size, least, -most(FP8), most(FP8), *plain)
        return out, scale
