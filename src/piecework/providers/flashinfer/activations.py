"""Gated activations by `silu_and_mul`, `gelu_and_mul` and `gelu_tanh_and_mul`, which read 16 bytes at a time."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from piecework.providers.families.conditions import multiple, of_one_type, of_types, on_device
from piecework.providers.families.gated import GatedKernels, implement_gated
from piecework.providers.flashinfer.norms import NAME


def why_not_gated(gate: Tensor, up: Tensor) -> str:
    """Return why FlashInfer's kernels can't take a call's gate and up, or ""; those of sgl-kernel are the same."""
    return (
        on_device(("cuda",), gate)
        or of_types((torch.bfloat16, torch.float16), gate)
        or of_one_type(gate, up, what="up")
        or multiple(gate.shape[-1], 8, what="intermediate size")
    )


def gated_kernels(package: ModuleType) -> GatedKernels:
    """Return the gated activations of a package that has functions of FlashInfer's names and parameters."""
    return GatedKernels(
        silu=lambda both, out: package.silu_and_mul(both, out=out),
        gelu=lambda both, out: package.gelu_and_mul(both, out=out),
        gelu_tanh=lambda both, out: package.gelu_tanh_and_mul(both, out=out),
        why_not=why_not_gated,
    )


def register(package: ModuleType) -> None:
    """Register the implementations."""
    implement_gated(NAME, gated_kernels(package))
