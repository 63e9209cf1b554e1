"""`opaque_op`: a function with type hints becomes an operator that compilers don't look into.

    @opaque_op("mylib::update", mutates=("cache",))
    def update(x: Tensor, cache: Tensor, layer: LayerNameType, eps: float = 1e-6) -> Tensor: ...

    @update.fake
    def _(x, cache, layer, eps=1e-6):
        return torch.empty_like(x)

A fake implementation says what results look like without computing them; every trace needs it. `update.check(...)` and
`check_ops()` compare what the operator does with what it declares. IR ops that the function calls are compiled, as
bodies of their own, where `@update.calls` declares them (ops/ir/declared_calls.py).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, final, overload

import torch

from piecework.errors import OpError
from piecework.foundation.torch_private import (
    attach_declaration,
    attached_declaration,
    cuda_graph_unsafe_tags,
    find_overload,
    intercept_calls,
    is_stand_in,
    withdraw,
)
from piecework.ops.ir.checks import run_checked
from piecework.ops.ir.declared_calls import Calls, check_calls
from piecework.ops.ir.schema import OpSchema, check_fake, infer_schema

_Fake = TypeVar("_Fake", bound=Callable[..., Any])
_Calls = TypeVar("_Calls", bound=Calls)


@final
class OpaqueOp:
    """A declared operator; calling it goes through torch's dispatcher. Made by `opaque_op`.

    Attributes:
        name: "namespace::name".
        function: the plain Python function; where nothing is traced, calling it does the same at less cost.
        overload: torch's own object for the operator.
        cuda_graph_safe: whether its call may be recorded in a CUDA graph.
        mutates: parameters that it writes to.
        layer_parameters: parameters that may name a layer: annotated LayerNameType or str.
        declaration: what `calls` was given, or None.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        schema: OpSchema,
        mutates: Sequence[str],
        cuda_graph_safe: bool,
    ) -> None:
        self.name = f"{schema.namespace}::{schema.short}"
        self.function = function
        self.cuda_graph_safe = cuda_graph_safe
        self.mutates = tuple(mutates)
        self.layer_parameters = schema.layer_parameters
        self._schema = schema
        self.__name__, self.__doc__, self.__signature__ = function.__name__, function.__doc__, schema.signature
        self._fake: Callable[..., Any] | None = None
        self.declaration: Calls | None = None
        # The operator exists for as long as this library object does.
        self._library = torch.library.Library(schema.namespace, "FRAGMENT")
        tags = (torch.Tag.pt2_compliant_tag, *(() if cuda_graph_safe else cuda_graph_unsafe_tags()))
        self._library.define(schema.text, tags=tags)
        self._library.impl(schema.short, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(self.name, self._run_fake, lib=self._library)
        self.overload = find_overload(self.name)
        attach_declaration(self.overload, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the operator through the dispatcher."""
        return self.overload(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<opaque op {self.name}>"

    def __deepcopy__(self, memo: object) -> OpaqueOp:
        return self

    @property
    def has_fake(self) -> bool:
        """Whether anything says what its results look like."""
        return self._fake is not None or self._schema.returns_nothing

    def results(self, *args: Any, **kwargs: Any) -> Any:
        """Return what its fake implementation gives for some arguments, called directly. Raises OpError without one."""
        return self._run_fake(*args, **kwargs)

    def fake(self, function: _Fake) -> _Fake:
        """Take `function` as the fake implementation: same parameters, results of the same metadata, no work.

        It may be given fewer parameters with *args and **kwargs for the rest. Raises OpError for another signature.
        """
        check_fake(function, self._schema.signature, name=self.name)
        self._fake = function
        return function

    def calls(self, function: _Calls) -> _Calls:
        """Take `function` as the declaration of the IR ops that are called inside; see ops/ir/declared_calls.py.

        It takes the dynamic sizes' maker and then what the operator takes (or fewer, with *args and **kwargs for the
        rest), and yields (op, arguments) or (op, arguments, arguments by name). A compile makes a body for each; calls
        with other arguments run uncompiled. Raises OpError for another signature.
        """
        check_calls(function, self._schema.signature, name=self.name)
        self.declaration = function
        return function

    def check(self, *args: Any, **kwargs: Any) -> Any:
        """Run the operator once, return its result, and raise OpError where it doesn't do what it declares.

        Compared are: results with the fake implementation's (number, shape, stride, dtype, device); arguments before
        and after, unless declared as changed; memory that results and changed arguments share with other arguments.
        """
        return run_checked(
            self.overload,  # which converts arguments: a whole number for a float
            name=self.name,
            overload=self.overload,
            signature=self._schema.signature,
            mutates=self.mutates,
            args=args,
            kwargs=kwargs,
        )

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def _run_fake(self, *args: Any, **kwargs: Any) -> Any:
        if self._fake is not None:
            return self._fake(*args, **kwargs)
        if self._schema.returns_nothing:
            return None
        raise OpError(
            asked=f"trace the operator {self.name}",
            found="no fake implementation, which says what its results look like",
            try_=f"@{self.function.__name__}.fake on a function of the same parameters",
        )

    def _declare_again(self, function: Callable[..., Any]) -> OpaqueOp:
        """Take the function of a module that was imported again."""
        self.function = function
        self._fake = None
        self.declaration = None
        return self


@overload
def opaque_op(name: Callable[..., Any], /) -> OpaqueOp: ...


@overload
def opaque_op(
    name: str | None = None,
    /,
    *,
    mutates: Sequence[str] = (),
    cuda_graph_safe: bool = False,
) -> Callable[[Callable[..., Any]], OpaqueOp]: ...


def opaque_op(
    name: str | Callable[..., Any] | None = None,
    /,
    *,
    mutates: Sequence[str] = (),
    cuda_graph_safe: bool = False,
) -> Any:
    """Declare a function with type hints as an operator that compilers don't look into.

    Args:
        name: "namespace::name"; default: "<top package>::<function name>".
        mutates: the tensor parameters that the function writes to. State that it finds by a layer's name isn't listed.
        cuda_graph_safe: whether a call may be recorded in a CUDA graph: no synchronisation, no allocation outside of
            torch, no state on the host that changes from call to call.

    Declaring a function again, because its module is reloaded or imported under another name, replaces it quietly.
    Raises OpError where the function can't be an operator, or the name is another function's.
    """
    mutates = (mutates,) if isinstance(mutates, str) else tuple(mutates)

    def declare(function: Callable[..., Any]) -> OpaqueOp:
        schema = infer_schema(function, name=None if callable(name) else name, mutates=mutates)
        qualified = f"{schema.namespace}::{schema.short}"
        taken = find_overload(qualified)
        if taken is not None:
            known = declared_op(taken)
            if known is None or not _same_place(known.function, function):
                raise OpError(
                    asked=f"declare {function.__qualname__} of {function.__module__} as the operator {qualified}",
                    found="an operator of that name"
                    + (f", {known.function.__qualname__} of {known.function.__module__}" if known else ""),
                    try_="another name",
                )
            if (known._schema.text, known.cuda_graph_safe) == (schema.text, cuda_graph_safe):
                return known._declare_again(function)
            withdraw(known._library)
        return OpaqueOp(function, schema=schema, mutates=mutates, cuda_graph_safe=cuda_graph_safe)

    return declare(name) if callable(name) else declare


def declared_op(target: object) -> OpaqueOp | None:
    """Return the declaration of an operator (torch's object for it, or "namespace::name"), or None."""
    found = attached_declaration(find_overload(target) if isinstance(target, str) else target)
    return found if isinstance(found, OpaqueOp) else None


@contextlib.contextmanager
def check_ops() -> Iterator[None]:
    """Inside, every declared operator that is called through torch runs with the checks of `OpaqueOp.check`.

    So do IR ops, and providers' implementations that a piece calls.
    """

    def handle(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        declared = attached_declaration(target)
        if declared is None or any(isinstance(a, torch.Tensor) and is_stand_in(a) for a in [*args, *kwargs.values()]):
            return target(*args, **kwargs)
        return declared.check(*args, **kwargs)

    with intercept_calls(handle):
        yield


def _same_place(known: Callable[..., Any], function: Callable[..., Any]) -> bool:
    """Whether both are the same function of a source file or module, perhaps read at different times.

    Two functions that one factory made run the same code over other values: those are different.
    """
    known, function = inspect.unwrap(known), inspect.unwrap(function)
    if known.__code__ is function.__code__ and _cells(known) != _cells(function):
        return False
    return known.__qualname__ == function.__qualname__ and (
        known.__code__.co_filename == function.__code__.co_filename or known.__module__ == function.__module__
    )


def _cells(function: Callable[..., Any]) -> list[int]:
    """Return what tells functions apart that one factory made: the objects they close over."""
    return [id(cell.cell_contents) for cell in function.__closure__ or ()]
