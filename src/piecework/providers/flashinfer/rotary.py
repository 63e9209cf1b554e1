"""Rotary embedding by `apply_rope_with_cos_sin_cache_inplace`: whole heads of some sizes, by a table in float32."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from piecework.providers.families.conditions import of_one_type, of_types, on_device
from piecework.providers.families.rotary import RotaryKernels, implement_rotary
from piecework.providers.flashinfer.norms import NAME

HEAD_DIMS = (64, 128, 256, 512)


def why_not_rotary(q: Tensor, k: Tensor, cos: Tensor) -> str:
    """Return why FlashInfer's kernel can't rotate a call's queries, or ""; that of sgl-kernel is the same."""
    if q.shape[-1] not in HEAD_DIMS:
        return f"heads of {q.shape[-1]}, the kernel has {', '.join(map(str, HEAD_DIMS))}"
    if cos.shape[-1] != q.shape[-1]:
        return f"{cos.shape[-1]} of {q.shape[-1]} elements of a head are rotated, the kernel does so with whole heads"
    return (
        on_device(("cuda",), q) or of_types((torch.bfloat16, torch.float16), q) or of_one_type(q, k, what="keys' type")
    )


def rotary_kernels(package: ModuleType) -> RotaryKernels:
    """Return the rotary embedding of a package that has a function of FlashInfer's name and parameters."""

    def rotate(positions: Tensor, q: Tensor, k: Tensor, head_dim: int, table: Tensor, halves: bool) -> None:  # noqa: FBT001
        package.apply_rope_with_cos_sin_cache_inplace(positions, q, k, head_dim, table, is_neox=halves)

    return RotaryKernels(rotate, torch.float32, why_not_rotary)


def register(package: ModuleType) -> None:
    """Register the implementation."""
    implement_rotary(NAME, rotary_kernels(package))
