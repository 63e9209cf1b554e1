"""`flattened`: a function of values becomes what an operator calls, whose schema knows no values.

    class Sequences(NamedTuple):
        block_tables: Tensor
        seq_lens: Tensor

    @opaque_op("mylib::attend")
    @flattened
    def attend(query: Tensor, sequences: Sequences, scale: float = 1.0) -> Tensor: ...

The operator's schema is then attend(Tensor query, Tensor block_tables, Tensor seq_lens, float scale=1.0).
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

Result = TypeVar("Result")

_REQUIRED: Final = inspect.Parameter.empty


def flattened(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function that takes, for each parameter that is a NamedTuple, one argument per field, in its place.

    Names, types and defaults are the fields' own; a parameter's default gives its fields theirs. What it returns is
    called by position or by name.
    """
    signature = inspect.signature(function, eval_str=True)
    flat: list[inspect.Parameter] = []
    groups: list[tuple[Callable[[Sequence[Any]], Any] | None, int, int]] = []  # what makes a value, of which arguments
    for parameter in signature.parameters.values():
        begin = len(flat)
        value = _is_value(parameter.annotation)
        flat += _fields(parameter) if value else [parameter]
        groups.append((parameter.annotation._make if value else None, begin, len(flat)))
    names = [p.name for p in flat]
    defaults = [p.default for p in flat]
    flat_signature = signature.replace(parameters=flat)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Result:
        if len(args) < len(names):
            begin = len(args)
            rest = [kwargs.pop(n, d) for n, d in zip(names[begin:], defaults[begin:], strict=True)]
            args = (*args, *rest)
            if _REQUIRED in rest:
                raise TypeError(f"{function.__qualname__} misses an argument: {', '.join(names[begin:])}")
        if kwargs or len(args) > len(names):
            raise TypeError(f"{function.__qualname__} takes {flat_signature}, and was given more: {', '.join(kwargs)}")
        return function(*[args[begin] if make is None else make(args[begin:end]) for make, begin, end in groups])

    call.__signature__ = flat_signature  # type: ignore[attr-defined]
    return call


def _is_value(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")


def _fields(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    kind: Any = parameter.annotation
    given = kind._field_defaults if parameter.default is _REQUIRED else parameter.default._asdict()
    for name, annotation in typing.get_type_hints(kind).items():
        yield parameter.replace(name=name, annotation=annotation, default=given.get(name, _REQUIRED))
