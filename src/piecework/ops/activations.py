"""Gated activations: `silu_mul` and `gelu_mul` (Shazeer 2020, arXiv:2002.05202).

Shape suffix: I intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from piecework.ops.ir.inputs import Draw
from piecework.ops.ir.op import op

_TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def _silu_inputs(draw: Draw) -> Sequence[Any]:
    width = draw.width()
    if draw.choose((True, False, False)):  # halves of one tensor, as a merged linear layer leaves them
        return draw.tensor(draw.rows, 2 * width, scale=3.0).chunk(2, dim=-1)
    return draw.tensor(1, draw.rows, width), draw.tensor(1, draw.rows, width)


def _gelu_inputs(draw: Draw) -> Sequence[Any]:
    return *_silu_inputs(draw), draw.choose(("none", "tanh"))


@op("piecework::silu_mul", inputs=_silu_inputs, tolerance=_TOLERANCE)
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up for gate and up [..., I], float32 | bfloat16 | float16: [..., I], the same dtype."""
    return silu(gate) * up


@op("piecework::gelu_mul", inputs=_gelu_inputs, tolerance=_TOLERANCE)
def gelu_mul(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """Return gelu(gate) * up.

    Args:
        gate, up: [..., I], float32 | bfloat16 | float16.
        approximate: "none" for the exact one, "tanh" for the approximation by tanh.

    Returns:
        [..., I], the same dtype.
    """
    return gelu(gate, approximate=approximate) * up
