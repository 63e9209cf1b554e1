"""An implementation of an IR op, and the operator by which a compiled piece calls it.

Results that lie in the memory of an argument are none of the operator's results: its schema says that it changes the
argument, and whoever calls it goes on with the argument. That is how torch, and Inductor with it, knows what happens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, get_args

import torch
from torch import Tensor

from piecework.errors import OpError
from piecework.foundation.torch_private import attach_declaration, find_overload
from piecework.ops.ir.checks import run_checked

_SEPARATOR: Final = "__"


@dataclass(frozen=True)
class Implementation:
    """One provider's implementation of an op.

    Attributes:
        op: the op's name, "namespace::name".
        provider: its name.
        function: takes what the op takes, and gives what it gives.
        supports: of a call's arguments, which may be fake: True, or False or the reason why not; None: everything.
        mutates: parameters whose contents are lost.
        reuses: for each result, the parameter in whose memory it lies, or "" for a new one; may be shorter.
        batch_invariant: whether a row's result is the same in any batch.
        inlined: whether a compile traces the function into a piece, as it does native ones; else a piece calls it.
        overload: torch's operator by which a piece calls it; None for those that are inlined.
    """

    op: str
    provider: str
    function: Callable[..., Any]
    supports: Callable[..., bool | str] | None = None
    mutates: tuple[str, ...] = ()
    reuses: tuple[str, ...] = ()
    batch_invariant: bool = False
    inlined: bool = False
    overload: Any = None

    @property
    def written(self) -> tuple[str, ...]:
        """The parameters that it writes to, each once."""
        return tuple(dict.fromkeys((*self.mutates, *filter(None, self.reuses))))

    def reused(self, result: int) -> str:
        """Return the parameter in whose memory a result lies, or ""."""
        return self.reuses[result] if result < len(self.reuses) else ""

    def kept(self, num_results: int) -> tuple[int, ...]:
        """Return the results that are new tensors."""
        return tuple(i for i in range(num_results) if not self.reused(i))


class SelectableOp(Protocol):
    """An op among whose implementations one is selected: `IrOp`.

    Attributes:
        name: "namespace::name".
        short_name: the name as orders of providers write it, without "piecework::".
        native: the function that defines it.
    """

    name: str
    short_name: str
    native: Callable[..., Any]

    @property
    def implementations(self) -> Mapping[str, Implementation]:
        """The implementations by provider."""

    def implementation(self, provider: str) -> Implementation | None:
        """Return a provider's implementation, or None."""

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Return a call's arguments, one for each parameter, or None where it can't be called so."""


def num_results(signature: inspect.Signature) -> int:
    """Return how many results a function with this signature has."""
    return len(get_args(signature.return_annotation)) or 1


def operator_name(op: str, provider: str) -> str:
    """Return the name of the operator that calls a provider's implementation of `op` ("namespace::name")."""
    namespace, _, short = op.partition("::")
    return f"{namespace}{_SEPARATOR}{provider}::{short}"


def provider_of(operator: str) -> str:
    """Return whose implementation an operator ("namespace::name") calls, or "" where it is none."""
    return operator.partition("::")[0].rpartition(_SEPARATOR)[2] if _SEPARATOR in operator.partition("::")[0] else ""


def define(
    name: str, schema: str, *, run: Callable[..., Any], fake: Callable[..., Any]
) -> tuple[torch.library.Library, Any]:
    """Register an operator; returns the library, which keeps it registered, and torch's object for it."""
    namespace, _, short = name.partition("::")
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(short, run, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=library)
    return library, find_overload(name)


def define_implementation(
    made: Implementation, *, native: Callable[..., Any], signature: inspect.Signature
) -> tuple[torch.library.Library, Any]:
    """Register the operator of an implementation."""
    kept = made.kept(num_results(signature))
    name = operator_name(made.op, made.provider)

    def operator() -> None:
        """Stand for the function: torch reads the signature only."""

    operator.__signature__ = signature.replace(return_annotation=_annotation(len(kept)))  # type: ignore[attr-defined]
    schema = torch.library.infer_schema(operator, mutates_args=made.written, op_name=name.partition("::")[2])

    def pick(results: Any) -> Any:
        several = results if isinstance(results, tuple) else (results,)
        left = tuple(several[i] for i in kept)
        return left if len(left) > 1 else left[0] if left else None

    def run(*args: Any, **kwargs: Any) -> Any:
        results = made.function(*args, **kwargs)
        check_reuse(made, results, signature.bind(*args, **kwargs).arguments)
        return pick(results)

    def fake(*args: Any, **kwargs: Any) -> Any:
        return pick(native(*args, **kwargs))

    library, overload = define(name, schema, run=run, fake=fake)
    attach_declaration(overload, CheckedImplementation(made, overload, signature))
    return library, overload


@dataclass(frozen=True)
class CheckedImplementation:
    """What `check_ops` finds at the operator of an implementation."""

    made: Implementation
    overload: Any
    signature: inspect.Signature

    def check(self, *args: Any, **kwargs: Any) -> Any:
        """Run the operator once, return its result, and raise OpError where it doesn't do what it declares."""
        return run_checked(
            self.overload,
            name=f"{self.made.provider}'s {self.made.op}",
            overload=self.overload,
            signature=self.signature,
            mutates=self.made.written,
            args=args,
            kwargs=kwargs,
        )


def check_reuse(made: Implementation, results: Any, arguments: Mapping[str, Any]) -> None:
    """Raise OpError where a result doesn't lie, whole, in the memory of the argument that it is declared to reuse."""
    several: Sequence[Any] = results if isinstance(results, tuple) else (results,)
    for index, name in enumerate(made.reuses):
        if not name:
            continue
        given, result = arguments[name], several[index]
        if (given.data_ptr(), given.shape, given.stride()) != (result.data_ptr(), result.shape, result.stride()):
            raise OpError(
                asked=f"run {made.provider}'s {made.op}, whose result {index} reuses {name!r}",
                found="a result that is not that argument's tensor",
                try_=f"write into {name!r} and return it, or leave `reuses` out",
            )


def _annotation(kept: int) -> Any:
    if kept == 0:
        return None
    return Tensor if kept == 1 else tuple.__class_getitem__((Tensor,) * kept)
