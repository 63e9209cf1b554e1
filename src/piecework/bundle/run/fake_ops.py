"""What an opaque op gives, found without running it: its fake implementation on tensors without memory.

Arguments are checked against the operator's schema first. torch's own machinery for that (FakeTensorMode) imports sympy
and is not used: tensors on the meta device do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from piecework.foundation.torch_private import (
    GROUPED_PRODUCT,
    TORCHS_NAMESPACES,
    Argument,
    can_run_on_meta,
    grouped_product_shape,
    operator_arguments,
    operator_name,
)
from piecework.ops.ir.layer import LayerName
from piecework.ops.ir.opaque_op import declared_op

_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "Tensor": (torch.Tensor,),
    "int": (int, torch.dtype, torch.layout, torch.memory_format),  # which is what schemas call all of these
    "SymInt": (int,),
    "float": (float, int),
    "number": (float, int, bool),
    "Scalar": (float, int, bool),
    "bool": (bool,),
    "str": (str,),
    "Device": (torch.device,),
}


@dataclass(frozen=True)
class FakeOp:
    """An operator, and what gives its results without running it; `run` None where nothing does."""

    overload: Any
    run: Callable[..., Any] | None


def fake_op(overload: Any) -> FakeOp:
    """Return an operator with what gives its results without running it."""
    declared = declared_op(overload)
    if declared is not None:
        return FakeOp(overload, declared.results if declared.has_fake else None)
    if operator_name(overload) == GROUPED_PRODUCT:
        return FakeOp(overload, grouped_product_shape)
    return FakeOp(overload, overload if can_run_on_meta(overload) else None)


def check_arguments(overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError where a call doesn't fit the operator's schema: too many, too few, of another type."""
    parameters = operator_arguments(overload)
    positional = [p for p in parameters if not p.is_keyword]
    if len(args) > len(positional):
        raise ValueError(f"{len(args)} arguments where it takes {len(positional)}")
    given = {p.name: value for p, value in zip(positional, args, strict=False)}
    known = {p.name for p in parameters}
    for name, value in kwargs.items():
        if name not in known or name in given:
            raise ValueError(f"an argument {name!r} that it doesn't take, or has already")
        given[name] = value
    wraps = str(operator_name(overload)).partition("::")[0] in TORCHS_NAMESPACES
    for parameter in parameters:
        if parameter.name in given:
            if not (wraps and _is_wrapped(parameter, given[parameter.name])):
                _check(parameter, given[parameter.name])
        elif not parameter.has_default:
            raise ValueError(f"no argument {parameter.name!r}")


def _is_wrapped(parameter: Argument, value: Any) -> bool:
    """Whether a value is a number that torch's own operators take for a tensor."""
    return parameter.type == "Tensor" and type(value) in (int, float, bool)


def _check(parameter: Argument, value: Any) -> None:
    if not _fits(parameter.type, value):
        raise ValueError(f"a {type(value).__name__} for {parameter.name!r}, which is of type {parameter.type}")


def _fits(kind: str, value: Any) -> bool:
    """Whether a value is of a schema's type, such as "Optional[Tensor]" or "List[int]"."""
    if kind.startswith("Optional["):
        return value is None or _fits(kind[len("Optional[") : -1], value)
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        return isinstance(value, list) and all(_fits(inner, item) for item in value)
    wanted = _KINDS.get(kind)
    if wanted is None:  # a layer's name, whose type is a class of ours
        return isinstance(value, (LayerName, str))
    return isinstance(value, wanted) and (type(value) is not bool or bool in wanted)
