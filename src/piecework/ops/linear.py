"""`piecework::linear`: a linear layer that stays one operator in captured graphs.

Below autograd torch writes `F.linear` as views, a transpose and a matrix product; keeping it whole lets a backend see
which constants are linear weights and bind them packed (docs/how-a-compile-flows.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

LINEAR_OP = "piecework::linear"
_library = torch.library.Library("piecework", "FRAGMENT")


def linear_native(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ weight.T + bias; x [..., in], weight [out, in], bias [out]; result [..., out] in x's dtype."""
    return torch.nn.functional.linear(x, weight, bias)


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


if not hasattr(torch.ops.piecework, "linear"):
    _library.define("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
    _library.impl("linear", linear_native, "CompositeExplicitAutograd")
    torch.library.register_fake(LINEAR_OP, _linear_fake, lib=_library)


class KeepLinear(TorchFunctionMode):
    """While active, `torch.nn.functional.linear` calls `piecework::linear`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Redirect linear layers, leave everything else alone."""
        if func is torch.nn.functional.linear:
            return torch.ops.piecework.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
