"""Rotary embedding by `_C::rotary_embedding`; its table has the queries' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from piecework.providers.families.conditions import of_one_type, of_types, on_device
from piecework.providers.families.rotary import RotaryKernels, implement_rotary
from piecework.providers.vllm.library import NAME, Operators

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register(operators: Operators) -> None:
    """Register the implementation."""
    rotary_embedding = operators.find("_C::rotary_embedding")
    if rotary_embedding is None:
        return

    def rotate(positions: Tensor, q: Tensor, k: Tensor, head_dim: int, table: Tensor, halves: bool) -> None:  # noqa: FBT001
        rotary_embedding(positions, q, k, head_dim, table, halves)

    def why_not(q: Tensor, k: Tensor, cos: Tensor) -> str:
        return (
            on_device((operators.device,), q)
            or of_types(_DTYPES, q)
            or of_one_type(q, k, what="the keys' type")
            or of_one_type(q, cos, what="the cosines' type")
        )

    implement_rotary(NAME, RotaryKernels(rotate, None, why_not))
