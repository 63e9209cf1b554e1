"""`piecework::linear`: a linear layer that stays one operator in captured graphs.

Below autograd torch writes `F.linear` as views, a transpose and a matrix product; keeping it whole lets a backend see
which constants are linear weights and bind them packed (docs/how-a-compile-flows.md): for oneDNN, or for code of our
own that becomes part of a piece, `linear_cpu` and, with a bias, `linear_bias_cpu`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from piecework.ops.packed import unpacked_linear

LINEAR_OP = "piecework::linear"
_library = torch.library.Library("piecework", "FRAGMENT")


def linear_native(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ weight.T + bias; x [..., in], weight [out, in], bias [out]; result [..., out] in x's dtype."""
    return torch.nn.functional.linear(x, weight, bias)


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear_unpacked(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return what `linear_native` does, of a packed weight (ops/packed.py), which is unpacked every time."""
    return linear_native(x, unpacked_linear(packed), bias)


# `linear_unpacked` comes apart when it is traced again; those for CPUs are called by names in C.
if not hasattr(torch.ops.piecework, "linear"):
    for _signature, _function, _key in (
        ("linear(Tensor x, Tensor weight, Tensor? bias=None)", linear_native, "CompositeExplicitAutograd"),
        ("linear_cpu(Tensor x, Tensor packed)", linear_unpacked, "CompositeExplicitAutograd"),
        ("linear_bias_cpu(Tensor x, Tensor packed, Tensor bias)", linear_unpacked, "CompositeExplicitAutograd"),
        ("linear_unpacked(Tensor x, Tensor packed, Tensor? bias=None)", linear_unpacked, "CompositeImplicitAutograd"),
    ):
        _name = _signature.partition("(")[0]
        _library.define(f"{_signature} -> Tensor")
        _library.impl(_name, _function, _key)
        if _key == "CompositeExplicitAutograd":
            torch.library.register_fake(f"piecework::{_name}", _linear_fake, lib=_library)


class KeepLinear(TorchFunctionMode):
    """While active, `torch.nn.functional.linear` calls `piecework::linear`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Redirect linear layers, leave everything else alone."""
        if func is torch.nn.functional.linear:
            return torch.ops.piecework.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
