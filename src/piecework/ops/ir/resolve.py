"""From the names in a program back to torch's operators."""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from piecework.errors import OpError
from piecework.foundation.torch_private import find_overload
from piecework.ops import head_matmul as _head_matmul  # noqa: F401  registers piecework::head_matmul
from piecework.ops import linear as _linear  # noqa: F401  registers piecework::linear
from piecework.ops import linear_quantized as _quantized  # noqa: F401  registers piecework::linear_quantized

_PYTHON = {
    f"operator.{n}": getattr(operator, n)
    for n in [
        "add",
        "sub",
        "mul",
        "floordiv",
        "truediv",
        "mod",
        "neg",
        "pow",
        "getitem",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "and_",
        "or_",
    ]
}
_TORCH = {f"torch.sym_{n}": getattr(torch, f"sym_{n}") for n in ["max", "min", "sum", "int", "float", "ite", "not"]}
_MATH = {f"math.{n}": getattr(math, n) for n in ["ceil", "floor", "trunc"]}
FUNCTIONS: Mapping[str, Callable[..., Any]] = {**_PYTHON, **_TORCH, **_MATH}
"""What programs call beside operators, on sizes."""


def resolve_target(name: str) -> Callable[..., Any]:
    """Return the operator that a program calls `name`: "aten.add.Tensor", "operator.mul", …; raises OpError."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    if namespace == "piecework" and find_overload(f"piecework::{rest}") is None:
        importlib.import_module("piecework.ops.catalogue")  # registers the IR's ops; a lowered program has none
    found: Callable[..., Any] | None = find_overload(f"{namespace}::{rest}") if rest.count(".") == 1 else None
    if found is None:
        raise OpError(
            asked=f"call the operator {name[:200]!r} of a piece",
            found="none of that name is registered in this process",
            try_="import the package that defines it",
        )
    return found
