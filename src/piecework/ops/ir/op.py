"""`piecework.op`: an operator of the IR, whose meaning is a function in plain torch, and that many may implement.

    @piecework.op("mylib::scaled", inputs=make_inputs, tolerance={torch.float32: 1e-6})
    def scaled(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor

    @scaled.implement("mylib_fast", supports=lambda x, factor=2.0: x.is_cuda or "not on a GPU")
    def _(x, factor=2.0): ...

The function is definition, default ("native") and test oracle at once. A call goes through torch's dispatcher, so that
a capture keeps it as one operator; a compile then chooses a provider for it (compiler/passes/lower.py), and an eager
call goes
by the innermost `piecework.providers(order)`. Where a compiled body serves the call (ops/ir/native_bodies.py), that
runs.
Inside a region of `torch.compile` the native function is traced in place of the call. The op keeps implementations,
which only ever become more, and nothing of what is selected.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, final

import torch

from piecework.errors import OpError
from piecework.foundation.torch_private import attach_declaration, attached_declaration, find_overload, withdraw
from piecework.ops.ir.checks import run_checked
from piecework.ops.ir.inputs import Draw
from piecework.ops.ir.native_bodies import NOT_COMPILED
from piecework.ops.ir.operator import (
    CheckedImplementation,
    Implementation,
    define,
    define_implementation,
    num_results,
)
from piecework.ops.ir.provider_order import NATIVE
from piecework.ops.ir.schema import OpSchema, check_fake, infer_schema
from piecework.ops.ir.selection import CallFacts, choose_implementation, current_selection

_F = TypeVar("_F", bound=Callable[..., Any])

InputMaker = Callable[[Draw], Sequence[Any]]
"""Draws arguments of an op: any shapes that it takes, the smallest and odd ones among them."""


@final
class IrOp:
    """An operator of the IR. Made by `op`, or by `existing` for one that is registered already.

    Attributes:
        name: "namespace::name".
        short_name: the name as orders of providers write it, without "piecework::".
        native: the function that defines it.
        signature: its signature.
        tolerance: by dtype of the inputs, how far an implementation's results may be from the native ones (absolute,
            and relative to their size).
        overload: torch's operator.
        by_rule: whether its implementation is not chosen among providers, but by a rule of its own.
    """

    def __init__(
        self,
        native: Callable[..., Any],
        *,
        schema: OpSchema,
        inputs: InputMaker,
        tolerance: Mapping[torch.dtype, float],
        overload: Any = None,
        mutates: Sequence[str] = (),
        by_rule: bool = False,
    ) -> None:
        self.name = f"{schema.namespace}::{schema.short}"
        self.short_name = self.name.removeprefix("piecework::")
        self.native = native
        self.signature = schema.signature
        self.tolerance = dict(tolerance)
        self.by_rule = by_rule
        self.__name__, self.__doc__, self.__signature__ = schema.short, native.__doc__, schema.signature
        self._inputs = inputs
        self._mutates = tuple(mutates)
        self._schema = schema
        parameters = schema.signature.parameters.values()
        self._names = tuple(p.name for p in parameters)
        self._defaults = tuple(p.default for p in parameters)
        self._num_by_position = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        num_required = sum(p.default is p.empty for p in parameters)
        # by the number of arguments that are given, those that are not: for calls without names
        self._tails = {n: self._defaults[n:] for n in range(num_required, self._num_by_position + 1)}
        self._mutex = threading.Lock()
        self._implementations = {NATIVE: Implementation(self.name, NATIVE, native, inlined=True)}
        self._libraries: list[torch.library.Library] = []  # operators exist for as long as these do
        self.overload = overload if overload is not None else self._define()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the op; arguments and results are the native function's."""
        if torch.compiler.is_compiling():
            return self.native(*args, **kwargs)
        selection = current_selection()
        if selection is not None and selection.bodies is not None:
            results = selection.bodies.call(self, args, kwargs, selection)
            if results is not NOT_COMPILED:
                return results
        return self.overload(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<op {self.name} of {', '.join(self._implementations)}>"

    def __deepcopy__(self, memo: object) -> IrOp:
        return self

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Return a call's arguments, one for each parameter and in their order, or None where it can't be called so."""
        given = len(args)
        if not kwargs and given in self._tails:
            return (*args, *self._tails[given])
        if given > self._num_by_position:
            return None
        names = self._names[given:]
        rest = [kwargs.get(name, default) for name, default in zip(names, self._defaults[given:], strict=True)]
        if sum(name in kwargs for name in names) != len(kwargs) or any(v is inspect.Parameter.empty for v in rest):
            return None
        return (*args, *rest)

    @property
    def implementations(self) -> Mapping[str, Implementation]:
        """The implementations by provider, as of now."""
        return dict(self._implementations)

    def implementation(self, provider: str) -> Implementation | None:
        """Return a provider's implementation, or None where it has registered none."""
        return self._implementations.get(provider)

    def make_inputs(self, seed: int, *, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
        """Return arguments for a test, the same for the same seed; seeds from 0 on go through shapes and options."""
        return tuple(self._inputs(Draw(seed, dtype=dtype, device=device)))

    def implement(
        self,
        provider: str,
        *,
        supports: Callable[..., bool | str] | None = None,
        mutates: str | Sequence[str] = (),
        reuses: str | Sequence[str] = (),
        batch_invariant: bool = False,
        inlined: bool = False,
    ) -> Callable[[_F], _F]:
        """Register a function as a provider's implementation: it takes the op's parameters, by name and position.

        Args:
            provider: its name; an identifier.
            supports: takes what the op takes; True, or False or the reason why this implementation can't do it. Under a
                compile tensors are fake, and sizes symbolic: an answer that depends on those counts as a no.
            mutates: parameters whose contents it destroys.
            reuses: the parameter in whose memory the result lies; for several results one each, "" for a new tensor.
                Such an implementation is used only where nothing reads those arguments afterwards.
            batch_invariant: whether a row's result is the same in any batch.
            inlined: whether it is made of torch's own operators, and is to be traced into pieces so that it fuses.

        Results must have the native ones' shapes, dtypes and strides. Raises OpError for a signature that differs, for
        parameters that don't exist, and for a provider that has registered before.
        """

        def register(function: _F) -> _F:
            asked = f"register {function.__qualname__} as {provider}'s implementation of {self.name}"
            made = Implementation(
                self.name,
                provider,
                function,
                supports,
                (mutates,) if isinstance(mutates, str) else tuple(mutates),
                (reuses,) if isinstance(reuses, str) else tuple(reuses),
                batch_invariant,
                inlined,
            )
            self._check(made, asked=asked)
            with self._mutex:
                if provider in self._implementations:
                    raise OpError(asked=asked, found="one that is there already", try_="another provider's name")
                self._implementations = {**self._implementations, provider: self._with_operator(made)}
            return function

        return register

    def check(self, *args: Any, provider: str = "", **kwargs: Any) -> Any:
        """Run the op once and return its results; raise OpError where it doesn't do what it declares.

        Results are compared with the native ones' number, shapes, strides, dtypes and devices. Only arguments that the
        implementation declares to write to may change, and only results that it declares to reuse them may share memory
        with them.

        Args:
            args, kwargs: of the op.
            provider: whose implementation; "" for the one that a call has.
        """
        found = self._implementations.get(provider)
        if provider and found is None:
            raise OpError(asked=f"check {provider}'s {self.name}", found=f"only {self!r}", try_="register it")
        if found is not None and found.overload is not None:
            results = CheckedImplementation(found, found.overload, self.signature).check(*args, **kwargs)
            return self._with_reused(found, results, self.signature.bind(*args, **kwargs).arguments)
        return run_checked(
            self.overload if found is None else found.function,
            name=self.name if found is None else f"{provider}'s {self.name}",
            overload=self.overload,
            signature=self.signature,
            mutates=self._mutates,
            args=args,
            kwargs=kwargs,
        )

    def _with_reused(self, made: Implementation, new: Any, given: Mapping[str, Any]) -> Any:
        """Return all results, of which the operator of an implementation gives only the new ones."""
        left = iter(new if isinstance(new, tuple) else () if new is None else (new,))
        several = [given[made.reused(i)] if made.reused(i) else next(left) for i in range(num_results(self.signature))]
        return tuple(several) if len(several) > 1 else several[0]

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        selection = current_selection()
        if selection is None:
            return self.native(*args, **kwargs)
        choice = choose_implementation(selection.order, self, args, kwargs, facts=CallFacts(absent=selection.absent))
        return choice.implementation.function(*args, **kwargs)

    def _run_native(self, *args: Any, **kwargs: Any) -> Any:
        return self.native(*args, **kwargs)

    def _define(self) -> Any:
        library, overload = define(self.name, self._schema.text, run=self._run, fake=self._run_native)
        self._libraries.append(library)
        attach_declaration(overload, self)
        return overload

    def _declare_again(self, native: Callable[..., Any], *, inputs: InputMaker, tolerance: Mapping[Any, float]) -> IrOp:
        """Take the function of a module that was imported again; implementations stay."""
        with self._mutex:
            self.native, self._inputs, self.tolerance = native, inputs, dict(tolerance)
            self._implementations = {
                **self._implementations,
                NATIVE: replace(self._implementations[NATIVE], function=native),
            }
        return self

    def _with_operator(self, made: Implementation) -> Implementation:
        if made.inlined:
            return made
        library, overload = define_implementation(made, native=self._run_native, signature=self.signature)
        self._libraries.append(library)
        return replace(made, overload=overload)

    def _check(self, made: Implementation, *, asked: str) -> None:
        if self.by_rule:
            raise OpError(asked=asked, found="an operator that has no providers", try_="an op of the IR's own")
        check_fake(made.function, self.signature, name=self.name, what="an implementation")
        if made.supports is not None:
            check_fake(made.supports, self.signature, name=self.name, what="`supports`")
        if not made.provider.isidentifier():
            raise OpError(asked=asked, found=f"the name {made.provider!r}", try_="an identifier, such as my_kernels")
        tensors = [n for n, p in self.signature.parameters.items() if p.annotation is torch.Tensor]
        unknown = [name for name in made.written if name not in tensors]
        if unknown:
            raise OpError(
                asked=asked,
                found=f"{unknown[0]!r}, which it is to write to, and which is no tensor parameter",
                try_=f"one of {', '.join(tensors)}",
            )
        if len(made.reuses) > num_results(self.signature) or (made.written and made.inlined):
            raise OpError(
                asked=asked,
                found="an inlined implementation that writes to arguments" if made.inlined else "too many in `reuses`",
                try_="in-place implementations are called, not inlined: leave `inlined` out"
                if made.inlined
                else "one parameter for each result at most",
            )


def op(
    name: str | None = None, /, *, inputs: InputMaker, tolerance: Mapping[torch.dtype, float]
) -> Callable[[Callable[..., Any]], IrOp]:
    """Declare a function in plain torch, with type hints, as an operator of the IR.

    Args:
        name: "namespace::name"; default: "<top package>::<function name>".
        inputs: draws arguments for the generated tests.
        tolerance: by dtype of the inputs, how far implementations may be from the function.

    The function changes no argument and returns a new tensor, or a tuple of new tensors. Declaring it again, because
    its module is imported again, replaces it. Raises OpError where the function can't be an operator, or the name is
    taken.
    """

    def declare(function: Callable[..., Any]) -> IrOp:
        schema = infer_schema(function, name=name, mutates=())
        _check_results(schema, function)
        qualified = f"{schema.namespace}::{schema.short}"
        taken = find_overload(qualified)
        if taken is not None:
            known = ir_op(taken)
            if known is None or _place(known.native) != _place(function):
                raise OpError(
                    asked=f"declare {function.__qualname__} of {function.__module__} as the op {qualified}",
                    found="an operator of that name",
                    try_="another name",
                )
            if known._schema.text == schema.text:
                return known._declare_again(function, inputs=inputs, tolerance=tolerance)
            for library in known._libraries:
                withdraw(library)
        return IrOp(function, schema=schema, inputs=inputs, tolerance=tolerance)

    return declare


def existing(
    name: str,
    native: Callable[..., Any],
    *,
    inputs: InputMaker,
    tolerance: Mapping[torch.dtype, float],
    mutates: Sequence[str] = (),
) -> IrOp:
    """Return the IR's view of an operator that is registered already: what defines it, inputs and tolerances.

    The operator's behaviour stays what it is. Arguments as for `op`; `mutates` is the operator's.
    """
    schema = infer_schema(native, name=name, mutates=mutates)
    return IrOp(
        native,
        schema=schema,
        inputs=inputs,
        tolerance=tolerance,
        overload=find_overload(name),
        mutates=mutates,
        by_rule=True,
    )


def ir_op(target: object) -> IrOp | None:
    """Return the op of torch's object for an operator, or of "namespace::name", that `op` has declared; or None."""
    found = attached_declaration(find_overload(target) if isinstance(target, str) else target)
    return found if isinstance(found, IrOp) else None


def _check_results(schema: OpSchema, function: Callable[..., Any]) -> None:
    result = schema.signature.return_annotation
    parts = getattr(result, "__args__", (result,))
    if any(part is not torch.Tensor for part in parts):
        raise OpError(
            asked=f"declare {function.__qualname__} as an op",
            found=f"results of type {result}",
            try_="-> Tensor, or -> tuple[Tensor, Tensor]",
        )


def _place(function: Callable[..., Any]) -> tuple[str, str]:
    return inspect.getfile(function), function.__qualname__
