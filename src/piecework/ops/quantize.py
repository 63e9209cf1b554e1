"""Quantization of activations: with a given scale, a scale per row, or one per group of a row.

fp8 is float8_e4m3fn (OCP 8-bit floating point, no infinities, largest value 448). Scales multiply: x ≈ q * scale.

Shape suffixes: H row length, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from piecework.ops.ir.inputs import Draw
from piecework.ops.ir.op import op

FP8: Final = torch.float8_e4m3fn
LEAST_MAGNITUDE: Final = 1e-10
"""What the largest magnitude of a group counts as at least, so that zeros give zeros and no division by zero."""
LEAST_FP8_SCALE: Final = 1.0 / (448.0 * 512.0)
"""The least scale of a row in fp8, as the kernels of FBGEMM, TensorRT-LLM and vLLM have it."""
LEAST_INT8_SCALE: Final = 1e-12
"""The least scale of a row in int8."""
_TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def _static_inputs(draw: Draw) -> Sequence[Any]:
    return draw.tensor(draw.rows, draw.width(), scale=20.0), torch.tensor([0.05], device=draw.device)


def _per_token_inputs(draw: Draw) -> Sequence[Any]:
    x = draw.tensor(draw.rows, draw.width(), scale=5.0)
    return (x * 0 if draw.choose((False, False, True)) else x), draw.choose((FP8, torch.int8))


def _group_inputs(draw: Draw) -> Sequence[Any]:
    size = draw.choose((128, 64, 1))
    return draw.tensor(draw.rows, draw.width(multiple_of=size), scale=5.0), size


def most(dtype: torch.dtype) -> float:
    """Return the largest value that is used of a quantized dtype: 448 of fp8, 127 of int8."""
    return torch.finfo(dtype).max if dtype.is_floating_point else float(torch.iinfo(dtype).max)


@op("piecework::quantize_static_fp8", inputs=_static_inputs, tolerance=_TOLERANCE)
def quantize_static_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Divide by a scale that is known before, and round to fp8; what is too large becomes the largest value.

    Args:
        x: [..., H], float32 | bfloat16 | float16.
        scale: [1] float32.

    Returns:
        [..., H] float8_e4m3fn.
    """
    return (x.float() / scale).clamp(-most(FP8), most(FP8)).to(FP8)


@op("piecework::quantize_dynamic_per_token", inputs=_per_token_inputs, tolerance=_TOLERANCE)
def quantize_dynamic_per_token(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Quantize each row by its largest magnitude.

    Args:
        x: [..., H], float32 | bfloat16 | float16; H at least 1.
        dtype: float8_e4m3fn, with scales of at least 1 / (448 * 512); or int8 (symmetric, -127 to 127, halves rounded
            to even).

    Returns:
        [..., H] of `dtype`, and the scales [..., 1] float32.
    """
    wide = x.float()
    least = LEAST_FP8_SCALE if dtype.is_floating_point else LEAST_INT8_SCALE
    scale = (wide.abs().amax(-1, keepdim=True) / most(dtype)).clamp_min(least)
    scaled = wide / scale
    rounded = scaled if dtype.is_floating_point else scaled.round()
    return rounded.clamp(-most(dtype), most(dtype)).to(dtype), scale


@op("piecework::quantize_group_fp8", inputs=_group_inputs, tolerance=_TOLERANCE)
def quantize_group_fp8(x: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
    """Quantize each group of neighbours in a row by its largest magnitude (as DeepSeek-V3, arXiv:2412.19437).

    Args:
        x: [..., H], float32 | bfloat16 | float16.
        group_size: divides H.

    Returns:
        [..., H] float8_e4m3fn, and the scales [..., H / group_size] float32, at least 1e-10 / 448.
    """
    grouped = x.float().unflatten(-1, (-1, group_size))
    scale = grouped.abs().amax(-1).clamp_min(LEAST_MAGNITUDE) / most(FP8)
    made = (grouped / scale.unsqueeze(-1)).clamp(-most(FP8), most(FP8)).to(FP8)
    return made.flatten(-2), scale
