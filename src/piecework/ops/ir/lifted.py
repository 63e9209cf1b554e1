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

from piecework.foundation.digests import digest_json
from piecework.foundation.torch_private import (
    ReferenceBase,
    has_reference_types,
    operator_arguments,
    operator_returns,
    real_object,
    reference_type_name,
    register_reference_type,
)
from piecework.ops.ir.opaque_op import declared_op

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
    exact = digest_json([str(overload), str(overload._schema), list(positions)])[:12]
    return f"{plain}__{'_'.join(str(p) for p in positions)}__{exact}"


def _register(name: str, overload: Any, positions: frozenset[int]) -> None:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    carrier = reference_type_name(Lifted)
    arguments = operator_arguments(overload)
    parts = [f"{carrier} {a.name}" if i in positions else a.text for i, a in enumerate(arguments)]
    library.define(f"{name}({', '.join(parts)}) -> {operator_returns(overload)}", tags=(torch.Tag.pt2_compliant_tag,))
    keywords = [a.name for a in arguments if a.is_keyword]
    first = len(arguments) - len(keywords)
    declared = declared_op(overload)

    def call(function: Any, values: Sequence[Any]) -> Any:
        return function(*values[:first], **dict(zip(keywords, values[first:], strict=True)))

    def run(*args: Any) -> Any:
        values = [a.value if i in positions else a for i, a in enumerate(args)]
        return call(overload if declared is None else declared.function, values)

    def fake(*args: Any) -> Any:
        values: list[Any] = [real_object(a) if i in positions else a for i, a in enumerate(args)]
        return call(overload, [v.value if isinstance(v, Lifted) else v for v in values])

    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    getattr(getattr(torch.ops, NAMESPACE), name).default.piecework_library = library  # lives as long as the operator
