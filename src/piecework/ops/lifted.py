"""Operators whose names and numbers are arguments of the graph and not constants of it.

A custom operator that stays inside a compiled piece, and takes a string or a number that differs from layer to layer,
would make every layer's piece another one. `lifted_operator` gives the same operator with those arguments as objects
that a compiler takes for inputs of the graph. The value itself is passed at run time, so results are the same; what
shapes come out was checked where the pieces were found equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch

from piecework.foundation.torch_private import (
    ReferenceBase,
    has_reference_types,
    operator_arguments,
    operator_of,
    operator_returns,
    real_object,
    reference_type_name,
    register_reference_type,
)
from piecework.ops.opaque import implementation

NAMESPACE = "piecework_lifted"


@final
class Lifted(ReferenceBase):  # type: ignore[misc]
    """A string or number that was a constant of a graph, as an argument of it."""

    __slots__ = ("value",)

    def __init__(self, value: str | int) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Lifted({self.value!r})"


if has_reference_types():
    Lifted = register_reference_type(Lifted)  # type: ignore[misc]


def lifted_operator(overload: Any, positions: Sequence[int]) -> Any:
    """Return the operator that takes the arguments at `positions` as `Lifted`; registered when first asked for.

    Args:
        overload: an operator such as `torch.ops.mylib.update.default`.
        positions: of arguments in its schema's order.
    """
    name = lifted_name(overload, positions)
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        _register(name, overload, frozenset(positions))
    found: Any = getattr(getattr(torch.ops, NAMESPACE), name).default
    return found


def lifted_name(overload: Any, positions: Sequence[int]) -> str:
    """Return the name of that operator: it says which one it was made from, and how."""
    plain = str(overload).replace(".", "__")
    return f"{plain}__{'_'.join(str(p) for p in positions)}"


def _register(name: str, overload: Any, positions: frozenset[int]) -> None:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    carrier = reference_type_name(Lifted)
    arguments = operator_arguments(overload)
    parts = []
    for index, argument in enumerate(arguments):
        parts.append(f"{carrier} {argument.name}" if index in positions else argument.text)
    library.define(f"{name}({', '.join(parts)}) -> {operator_returns(overload)}", tags=(torch.Tag.pt2_compliant_tag,))
    operator = operator_of(overload)
    assert operator is not None
    direct = implementation(f"{operator.name}.{operator.overload}")

    def run(*args: Any) -> Any:
        return direct(*(a.value if i in positions else a for i, a in enumerate(args)))

    def fake(*args: Any) -> Any:
        return overload(*(real_object(a).value if i in positions else a for i, a in enumerate(args)))  # type: ignore[attr-defined]

    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    getattr(getattr(torch.ops, NAMESPACE), name).default.piecework_library = library  # lives as long as the operator
