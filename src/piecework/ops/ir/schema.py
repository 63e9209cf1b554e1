"""From a function with type hints to an operator's schema; what can't be one is an OpError that says why."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from piecework.errors import OpError
from piecework.ops.ir.layer import LayerNameType

_TORCHS_OWN = frozenset({"aten", "prim", "prims"})
_TYPES = (
    "Tensor, int, float, bool, str, torch.dtype, torch.device, LayerNameType, "
    "`X | None` of these but the last, and list[X] of Tensor, int, float, bool"
)


@dataclass(frozen=True)
class OpSchema:
    """What torch's registry needs of an operator.

    Attributes:
        namespace: the part of the name before "::".
        short: the part after it.
        text: the schema, such as "update(Tensor x, Tensor(a1!) cache) -> Tensor".
        signature: the function's signature with annotations evaluated.
        layer_parameters: parameters that may name a layer: annotated LayerNameType or str.
        returns_nothing: whether the operator gives no result.
    """

    namespace: str
    short: str
    text: str
    signature: inspect.Signature
    layer_parameters: tuple[str, ...]
    returns_nothing: bool


def infer_schema(function: Callable[..., Any], *, name: str | None, mutates: Iterable[str]) -> OpSchema:
    """Return the schema of `function` as an operator.

    Args:
        function: a plain function with type hints.
        name: "namespace::name"; default: "<top package>::<function name>".
        mutates: the tensor parameters (or lists of tensors) that the function writes to.

    Raises OpError where the name, a parameter, the result or `mutates` can't be those of an operator.
    """
    if not inspect.isfunction(function):
        raise OpError(
            asked=f"declare {function!r} as an operator",
            found=f"a {type(function).__name__}",
            try_="decorate a plain function",
        )
    namespace, short = _split_name(function, name)
    asked = f"declare {function.__qualname__} as the operator {namespace}::{short}"
    signature = _signature(function, asked=asked)
    for parameter in signature.parameters.values():
        _check_parameter(parameter, asked=asked)
    _check_result(signature, asked=asked)
    _check_mutates(signature, mutates, asked=asked)
    returns_nothing = signature.return_annotation is None
    if returns_nothing and not mutates:
        raise OpError(
            asked=asked,
            found="a function that returns nothing and changes no argument: nothing would keep it in a graph",
            try_="return a tensor (an empty one will do), or name the changed argument in `mutates`",
        )
    text = torch.library.infer_schema(_stub(signature), mutates_args=tuple(mutates), op_name=short)
    layers = tuple(p.name for p in signature.parameters.values() if p.annotation in (LayerNameType, str))
    return OpSchema(namespace, short, text, signature, layers, returns_nothing)


def check_fake(
    fake: Callable[..., Any], signature: inspect.Signature, *, name: str, what: str = "the fake implementation"
) -> None:
    """Raise OpError where `fake`, which is to be `what`, can't be called as the operator is.

    By position and by name, with its defaults.
    """
    wanted = list(signature.parameters.values())
    given = inspect.signature(fake).parameters.values()
    rest = {p.kind for p in given if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    named = [p for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    same = all(
        a.name == b.name and a.kind == b.kind and a.default == b.default for a, b in zip(named, wanted, strict=False)
    )
    covered = len(named) == len(wanted) or (len(named) < len(wanted) and len(rest) == 2)
    if not same or not covered:
        raise OpError(
            asked=f"use {fake.__qualname__} as {what} of {name}",
            found=f"it takes {_parameters(inspect.signature(fake))}, the operator {_parameters(signature)}",
            try_="give it the operator's parameters: same names, order and defaults",
        )


def _split_name(function: Callable[..., Any], name: str | None) -> tuple[str, str]:
    if name is None:
        name = f"{function.__module__.partition('.')[0]}::{function.__name__}"
    asked = f"declare {function.__qualname__} as the operator {name!r}"
    if not re.fullmatch(r"[A-Za-z_]\w*::[A-Za-z_]\w*", name):
        raise OpError(asked=asked, found="a name that is not of the form namespace::name", try_=f'"mylib::{name}"')
    namespace, _, short = name.partition("::")
    if namespace in _TORCHS_OWN:
        raise OpError(asked=asked, found=f"a namespace of torch's own, {namespace!r}", try_="your package's name")
    return namespace, short


def _signature(function: Callable[..., Any], *, asked: str) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        raise OpError(
            asked=asked,
            found=f"an annotation that can't be evaluated: {error}",
            try_="import its type at the top of the module, outside of `if TYPE_CHECKING`",
        ) from error


def _check_parameter(parameter: inspect.Parameter, *, asked: str) -> None:
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        raise OpError(
            asked=asked,
            found=f"a {parameter.kind.description} parameter {str(parameter)!r}",
            try_="name each parameter",
        )
    if parameter.annotation is parameter.empty:
        raise OpError(asked=asked, found=f"no type hint on parameter {parameter.name!r}", try_=f"one of {_TYPES}")
    without_default = parameter.replace(default=parameter.empty)
    if not _accepted(inspect.Signature([without_default], return_annotation=torch.Tensor)):
        raise OpError(
            asked=asked,
            found=f"parameter {parameter.name!r} of type {_type_name(parameter.annotation)}",
            try_=f"one of {_TYPES}",
        )
    if not _accepted(inspect.Signature([parameter], return_annotation=torch.Tensor)):
        raise OpError(
            asked=asked,
            found=f"parameter {parameter.name!r} with the default {parameter.default!r}",
            try_="None, a number, a string, a dtype or a device",
        )


def _check_result(signature: inspect.Signature, *, asked: str) -> None:
    result = signature.return_annotation
    if result is signature.empty:
        raise OpError(asked=asked, found="no type hint for the result", try_="-> Tensor, or -> None")
    if not _accepted(inspect.Signature([], return_annotation=result)):
        raise OpError(
            asked=asked,
            found=f"a result of type {_type_name(result)}",
            try_="Tensor, list[Tensor], int, float, bool, a tuple of these, or None",
        )


def _check_mutates(signature: inspect.Signature, mutates: Iterable[str], *, asked: str) -> None:
    for name in mutates:
        if name not in signature.parameters:
            raise OpError(
                asked=asked,
                found=f"`mutates` names {name!r}, which is no parameter",
                try_="one of " + ", ".join(signature.parameters),
            )
        annotation = signature.parameters[name].annotation
        schema = torch.library.infer_schema(
            _stub(inspect.Signature([signature.parameters[name]], return_annotation=torch.Tensor)), mutates_args=()
        )
        if not schema.startswith("(Tensor"):
            raise OpError(
                asked=asked,
                found=f"`mutates` names {name!r}, which is a {_type_name(annotation)} and no tensor",
                try_="leave it out: only tensors can be changed",
            )


def _accepted(signature: inspect.Signature) -> bool:
    try:
        torch.library.infer_schema(_stub(signature), mutates_args=())
    except ValueError:
        return False
    return True


def _stub(signature: inspect.Signature) -> Callable[..., Any]:
    """Return a function of that signature: torch then reads evaluated annotations, and not strings."""

    def stub() -> None:
        """Stand for the function."""

    stub.__signature__ = signature  # type: ignore[attr-defined]
    return stub


def _parameters(signature: inspect.Signature) -> str:
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
