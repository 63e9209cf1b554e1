"""Gated activations of a package, whose kernels take gate and up as the halves of one tensor [..., 2I].

That is how a merged linear layer leaves them. Gate and up as an op gets them are views of it; side by side in memory
they are handed over as what they were cut from, else they are copied next to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from piecework.ops.activations import gelu_mul, silu_mul
from piecework.providers.families.conditions import first_of

GatedKernel = Callable[[Tensor, Tensor], object]
"""Takes both halves [T, 2I] and writes to the result [T, I]."""


@dataclass(frozen=True)
class GatedKernels:
    """A package's kernels.

    Args:
        silu, gelu, gelu_tanh: the kernels.
        why_not: takes a call's gate; "" or why not. That the halves lie right is asked beside it.
    """

    silu: GatedKernel
    gelu: GatedKernel
    gelu_tanh: GatedKernel
    why_not: Callable[[Tensor, Tensor], str]


def implement_gated(provider: str, kernels: GatedKernels) -> None:
    """Register the implementations of `silu_mul` and `gelu_mul`."""

    def supports_silu(gate: Tensor, up: Tensor) -> bool | str:
        return first_of(kernels.why_not(gate, up), why_not_halves(gate, up))

    def supports_gelu(gate: Tensor, up: Tensor, approximate: str = "none") -> bool | str:
        return supports_silu(gate, up)

    @silu_mul.implement(provider, supports=supports_silu, batch_invariant=True)
    def silu(gate: Tensor, up: Tensor) -> Tensor:
        return _run(kernels.silu, gate, up)

    @gelu_mul.implement(provider, supports=supports_gelu, batch_invariant=True)
    def gelu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
        return _run(kernels.gelu if approximate == "none" else kernels.gelu_tanh, gate, up)


def why_not_halves(gate: Tensor, up: Tensor) -> str:
    """Return why two tensors can't be the halves of one, "" where their strides say that they can."""
    step = 2 * gate.shape[-1]
    for tensor in (gate, up):
        expected = step
        for axis in range(tensor.dim() - 2, -1, -1):
            if tensor.stride(axis) != expected:
                return "gate and up are not the halves of one tensor"
            expected = expected * tensor.shape[axis]
        if tensor.stride(-1) != 1:
            return "gate and up are not the halves of one tensor"
    return ""


def merged(gate: Tensor, up: Tensor) -> Tensor:
    """Return [T, 2I] of gate and up [..., I], without a copy where they are halves of one tensor."""
    width = gate.shape[-1]
    if up.data_ptr() == gate.data_ptr() + width * gate.element_size():
        return gate.as_strided((gate.numel() // width, 2 * width), (2 * width, 1))
    return torch.cat((gate, up), dim=-1).view(-1, 2 * width)


def _run(kernel: GatedKernel, gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    if out.numel():
        kernel(merged(gate, up), out.view(-1, out.shape[-1]))
    return out
