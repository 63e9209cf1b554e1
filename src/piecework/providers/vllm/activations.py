"""Gated activations by `_C::silu_and_mul`, `_C::gelu_and_mul` and `_C::gelu_tanh_and_mul`."""

from __future__ import annotations

import torch
from torch import Tensor

from piecework.providers.families.conditions import multiple, of_one_type, of_types, on_device
from piecework.providers.families.gated import GatedKernel, GatedKernels, implement_gated
from piecework.providers.vllm.library import NAME, Operators

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register(operators: Operators) -> None:
    """Register the implementations."""
    found = [operators.find(f"_C::{name}") for name in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")]
    silu, gelu, gelu_tanh = (_out_first(operator) for operator in found)
    if silu is None or gelu is None or gelu_tanh is None:
        return

    def why_not(gate: Tensor, up: Tensor) -> str:
        return (
            on_device((operators.device,), gate)
            or of_types(_DTYPES, gate)
            or of_one_type(gate, up, what="up")
            or (multiple(gate.shape[-1], 8, what="intermediate size") if operators.device == "cpu" else "")
        )

    implement_gated(NAME, GatedKernels(silu, gelu, gelu_tanh, why_not))


def _out_first(operator: object) -> GatedKernel | None:
    """Return an operator of (out, input) as a kernel of (input, out)."""
    return (lambda both, out: operator(out, both)) if callable(operator) else None
