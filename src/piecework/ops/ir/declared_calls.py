"""The IR ops that an opaque op calls inside, where no compiler looks, declared so that they are compiled all the same.

    @my_experts.calls
    def _(sizes, hidden, weights):
        rows = sizes.dynamic(hidden.shape[0])
        gate, up = hidden.new_empty(rows, 2 * weights.shape[1]).chunk(2, dim=-1)
        yield silu_mul, (gate, up)

The function gets stand-ins of the op's arguments, without values, and yields the calls with stand-ins as arguments:
their dtypes, sizes and layouts are what counts. A size of them that differs from call to call is made by `sizes`, or is
one of the arguments' own dynamic sizes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

from piecework.errors import OpError
from piecework.ops.ir.op import IrOp
from piecework.ops.ir.schema import check_fake

_EXAMPLE: Final = "yield silu_mul, (gate, up), or yield rms_norm, (x, weight), {'eps': 1e-5}"


@dataclass(frozen=True)
class DeclaredCall:
    """A call of an IR op with stand-ins of its arguments."""

    op: IrOp
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@final
class DynamicSizes:
    """Makes the sizes that differ from call to call.

    Args:
        make: makes a size of a name, from its least to its greatest value.
        upper: the greatest value of a size, which may be dynamic itself.
        asked: what is done, for errors.
    """

    def __init__(self, make: Callable[[str, int, int], Any], *, upper: Callable[[Any], int], asked: str) -> None:
        self._make = make
        self._upper = upper
        self._asked = asked
        self._count = 0

    def dynamic(self, high: int, *, low: int = 0) -> int:
        """Return a size of `low` to `high`, ends included; `high` may be computed from the arguments' sizes.

        Raises OpError for an empty range.
        """
        most = self._upper(high)
        if not 0 <= low <= most:
            raise OpError(
                asked=self._asked, found=f"a dynamic size from {low} to {most}", try_="0 <= low <= high, both included"
            )
        self._count += 1
        made: int = self._make(f"d{self._count}", low, most)
        return made


Calls = Callable[..., Iterable[Any]]


def check_calls(function: Calls, signature: inspect.Signature, *, name: str) -> None:
    """Raise OpError where a declaration can't be called with `sizes` and then as the opaque op `name` is."""
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        raise OpError(
            asked=f"use {function.__qualname__} as the declaration of the calls in {name}",
            found="no first parameter for the dynamic sizes",
            try_="def _(sizes, ...), followed by the operator's parameters",
        )
    rest: Any = functools.partial(function, None)
    rest.__qualname__ = function.__qualname__
    check_fake(rest, signature, name=name, what="the declaration of the calls")


def declared(
    function: Calls, sizes: DynamicSizes, args: Sequence[Any], kwargs: Mapping[str, Any], *, asked: str
) -> Iterator[DeclaredCall]:
    """Yield what a declaration yields for some arguments, which may be stand-ins. Raises OpError for anything else."""
    made = function(sizes, *args, **kwargs)
    if not isinstance(made, Iterable):
        raise OpError(asked=asked, found=f"a declaration that gives {made!r}", try_=_EXAMPLE)
    for item in made:
        yield _declared_call(item, asked=asked)


def _declared_call(item: Any, *, asked: str) -> DeclaredCall:
    parts = tuple(item) if isinstance(item, (tuple, list)) else ()
    well_formed = (
        2 <= len(parts) <= 3
        and isinstance(parts[1], (tuple, list))
        and (len(parts) == 2 or isinstance(parts[2], Mapping))
    )
    if not well_formed:
        raise OpError(asked=asked, found=f"the declared call {_short(item)}", try_=_EXAMPLE)
    call = DeclaredCall(parts[0], tuple(parts[1]), dict(parts[2]) if len(parts) == 3 else {})
    if not isinstance(call.op, IrOp) or call.op.by_rule:
        raise OpError(
            asked=asked,
            found=f"a declared call of {_short(parts[0])}, which is no operator that has providers",
            try_="declare operators of @piecework.op; what is called beside them needs no declaration",
        )
    if call.op.bound(call.args, call.kwargs) is None:
        raise OpError(
            asked=asked,
            found=f"{call.op.name} with {len(call.args)} arguments by position and {sorted(call.kwargs)} by name",
            try_=f"its parameters: {call.op.signature}",
        )
    return call


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
