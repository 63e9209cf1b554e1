"""The sizes of the frame that Dynamo is compiling. torch 2.11-2.13; torch/_guards.py, torch/fx/experimental."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from piecework.foundation.torch_private.expressions import parse_expression


def size_bounds(value: torch.SymInt) -> Mapping[str, tuple[int, int, int]]:
    """Return, for each symbol in a size, its lowest and highest value, and its value in the example."""
    node = value.node
    env = node.shape_env
    found = {}
    for symbol in node.expr.free_symbols:
        bounds = env.var_to_range[symbol]
        hint = env.backed_var_to_val.get(symbol) if hasattr(env, "backed_var_to_val") else env.var_to_val.get(symbol)
        found[str(symbol)] = _number(bounds.lower), _number(bounds.upper), int(hint) if hint is not None else 0
    return found


def _number(bound: Any) -> int:
    """Return a bound as a number; torch writes "no bound" as infinity, here sys.maxsize or its negative."""
    if getattr(bound, "is_Integer", False):
        return int(bound)
    return -sys.maxsize if bound < 0 else sys.maxsize


def is_static_input(node: torch.fx.Node, given: object) -> bool:
    """Whether a placeholder of Dynamo's graph is a parameter or a buffer of a module; `given` is what Dynamo gives.

    torch 2.11-2.15: torch/_dynamo/decorators.py (`mark_static_address`), which marks them when it traces them.
    """
    value = node.meta.get("example_value")
    return isinstance(value, torch.nn.Parameter) or any(
        getattr(v, "_dynamo_static_input_type", None) is not None for v in (value, given)
    )


def holds(condition: str, sizes: Mapping[str, torch.SymInt]) -> bool:
    """Whether a condition such as "Ne(s0, 8)" holds for sizes of the frame, which is guarded by it from then on.

    Args:
        condition: as `SymbolicSession.narrowing_guards` writes it.
        sizes: the condition's symbols → sizes of the frame.

    Raises ValueError where `condition` is none.
    """
    import sympy

    expression = parse_expression(condition, {name: size.node.expr for name, size in sizes.items()})
    if expression in (sympy.true, sympy.false):
        return bool(expression)
    env = next(iter(sizes.values())).node.shape_env
    return bool(env.evaluate_expr(expression))
