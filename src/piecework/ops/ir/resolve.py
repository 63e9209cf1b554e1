"""From the names in a program back to torch's operators."""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from piecework.errors import InternalError
from piecework.ops import head_matmul as _head_matmul  # noqa: F401  registers piecework::head_matmul
from piecework.ops import linear as _linear  # noqa: F401  registers piecework::linear

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
_TORCH = {f"torch.{n}": getattr(torch, n) for n in ["sym_max", "sym_min", "sym_int", "sym_float", "sym_ite", "sym_not"]}
_MATH = {f"math.{n}": getattr(math, n) for n in ["ceil", "floor", "trunc"]}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {**_PYTHON, **_TORCH, **_MATH}


def resolve_target(name: str) -> Callable[..., Any]:
    """Return the operator that a program calls `name`: "aten.add.Tensor", "operator.mul", …"""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) != 3:
        raise InternalError(f"no operator of a program: {name!r}")
    namespace, op, overload = parts
    if namespace == "piecework" and not hasattr(torch.ops.piecework, op):
        importlib.import_module("piecework.ops.catalogue")  # registers the IR's ops; a lowered program has none
    found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), op), overload)
    return found
