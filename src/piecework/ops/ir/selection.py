"""Which provider's implementation of an IR op is used: the rule that applies an order of providers.

A compile lowers by an order that it is given and records; eager calls go by the one of the innermost `providers(order)`
block, which threads and async tasks don't share. Neither the ops nor this module keep a selection. The same variable
leads calls inside a loaded model's opaque ops, and inside `piecework.eager_ops`, to the bodies that their owner has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Final, Protocol

from piecework.errors import OpError
from piecework.ops.ir.operator import Implementation, SelectableOp
from piecework.ops.ir.provider_order import NATIVE, ProviderOrder


@dataclass(frozen=True)
class Rejected:
    """A provider that was not taken, and why."""

    provider: str
    why: str


@dataclass(frozen=True)
class Choice:
    """The implementation that a call gets, and why each other one was not taken."""

    implementation: Implementation
    rejected: tuple[Rejected, ...] = ()

    @property
    def provider(self) -> str:
        """The provider's name."""
        return self.implementation.provider


@dataclass(frozen=True)
class CallFacts:
    """What is known of a call beside its arguments.

    Attributes:
        rows: the least and the greatest number of rows of the first tensor argument (product of all its axes but the
            last); None takes it from the argument, whose shape is then numbers.
        dead: parameters whose tensors nothing reads after the call, so that it may write to them.
        absent: why named providers could not be loaded.
        inside: whether the call is one of a piece (then reasons speak of the piece, not of eager code).
        ask: asks an implementation whether it supports the call; None asks its `supports` with the arguments.
    """

    rows: tuple[int, int] | None = None
    dead: frozenset[str] = frozenset()
    absent: Mapping[str, str] = field(default_factory=dict)
    inside: bool = False
    ask: Callable[[Implementation], bool | str] | None = None


_NOTHING_KNOWN: Final = CallFacts()


class Bodies(Protocol):
    """Compiled bodies of ops: `NativeBodies` (ops/ir/native_bodies.py).

    Attributes:
        order: by which they were chosen.
    """

    order: ProviderOrder

    @property
    def fallbacks(self) -> Mapping[str, int]:
        """How many calls ran uncompiled, by what they were."""

    def clear(self) -> None:
        """Let go of all bodies."""

    def call(self, op: SelectableOp, args: Sequence[Any], kwargs: Mapping[str, Any], selection: Selection) -> Any:
        """Run a call by the body that serves it, or return NOT_COMPILED."""


@dataclass(frozen=True)
class Selection:
    """What is selected for eager calls.

    Attributes:
        order: by which order they go.
        absent: why named providers are absent.
        bodies: compiled bodies that calls find, with no Dynamo in the way; None: calls go through the dispatcher.
        owner: who brought it by `entering`.
        outer: what was selected before that.
    """

    order: ProviderOrder
    absent: Mapping[str, str] = field(default_factory=dict)
    bodies: Bodies | None = None
    owner: object = None
    outer: Selection | None = None

    def running(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function with this selected; for what runs often."""
        token = _CURRENT.set(self)
        try:
            return function(*args)
        finally:
            _CURRENT.reset(token)


_CURRENT: Final[ContextVar[Selection | None]] = ContextVar("piecework_providers", default=None)


@contextlib.contextmanager
def selecting(order: ProviderOrder, *, absent: Mapping[str, str] | None = None) -> Iterator[ProviderOrder]:
    """Inside, IR ops that are called eagerly in this thread or task go by `order`; afterwards by what was before.

    Compiled bodies that the block around it has stay: those of the providers that `order` chooses.
    """
    before = _CURRENT.get()
    bodies = None if before is None else before.bodies
    if bodies is not None and order == bodies.order:
        order = bodies.order  # calls compare them by identity
    token = _CURRENT.set(Selection(order, absent or {}, bodies))
    try:
        yield order
    finally:
        _CURRENT.reset(token)


def entering(selection: Selection) -> None:
    """Select until `leaving`, in this thread or task; for objects that several of them enter, each for itself."""
    _CURRENT.set(replace(selection, outer=_CURRENT.get()))


def leaving(owner: object) -> None:
    """Go back to what was selected before `entering` with a selection of this owner. Raises OpError elsewhere."""
    current = _CURRENT.get()
    if current is None or current.owner is not owner:
        raise OpError(
            asked="leave a block of selected operators",
            found="another block, entered later, is still open" if current is not None else "none is open here",
            try_="leave blocks in the thread or task in which they were entered, the innermost first",
        )
    _CURRENT.set(current.outer)


def current_selection() -> Selection | None:
    """Return the selection of the innermost block, or None outside of any: then calls are native."""
    return _CURRENT.get()


def choose_implementation(
    order: ProviderOrder,
    op: SelectableOp,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    facts: CallFacts = _NOTHING_KNOWN,
) -> Choice:
    """Return the implementation for a call of `op`, and why each other one was not taken.

    Args:
        order: of providers.
        op: the op.
        args, kwargs: the call's; tensors may be fake, with symbolic sizes.
        facts: what else is known.

    Raises OpError where none of the providers supports the call.
    """
    given = kwargs or {}
    tensors = [a for a in (*args, *given.values()) if hasattr(a, "shape")]
    device = str(tensors[0].device.type) if tensors else ""
    names, rejected = _candidates(order, op.short_name, device=device, rows=_rows(tensors, facts))
    chosen: Implementation | None = None
    for name in names:
        implementation = op.implementation(name)
        if chosen is not None:
            rejected.append(Rejected(name, f"{chosen.provider} comes before it"))
            continue
        why = _why_not(op, implementation, name, args, given, facts)
        if why is None:
            chosen = implementation
        else:
            rejected.append(Rejected(name, why))
    rejected += [Rejected(n, "not in the order of providers") for n in op.implementations if n not in names]
    if chosen is None:
        raise OpError(
            asked=f"an implementation of {op.name} from {', '.join(names)}",
            found="; ".join(f"{r.provider}: {r.why}" for r in rejected if r.provider in names),
            try_=f'end the list with "native": {op.short_name}={",".join(names)},native',
        )
    return Choice(chosen, tuple(rejected))


def _candidates(
    order: ProviderOrder, op: str, *, device: str, rows: tuple[int, int] | None
) -> tuple[tuple[str, ...], list[Rejected]]:
    """Return the list that applies, and providers of lists that apply to a part of the rows only."""
    rejected: list[Rejected] = []
    for rule in order.ranges:
        if rule.op != op or rows is None:
            continue
        if rule.low <= rows[0] and rows[1] <= rule.high:
            return rule.providers, []
        if rule.low <= rows[1] and rows[0] <= rule.high:
            why = f"asked for {rule.low} to {rule.high} rows, the call may have {rows[0]} to {rows[1]}"
            rejected += [Rejected(name, why) for name in rule.providers if name != NATIVE]
    names = order.per_op.get(op) or order.per_device.get(device) or order.default
    return names, [r for r in rejected if r.provider not in names]


def _why_not(
    op: SelectableOp,
    implementation: Implementation | None,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    facts: CallFacts,
) -> str | None:
    """Return why a provider can't take a call, or None where it can."""
    if implementation is None:
        return facts.absent.get(name) or f"it has no implementation of {op.short_name}"
    alive = sorted({*implementation.mutates, *filter(None, implementation.reuses)} - facts.dead)
    if alive:
        where = "which the piece or its caller still reads" if facts.inside else "which eager code may still read"
        return f"it writes to {', '.join(alive)}, {where}"
    if facts.ask is not None:
        answer = facts.ask(implementation)
    else:
        answer = True if implementation.supports is None else implementation.supports(*args, **kwargs)
    if answer is True:
        return None
    return f"supports() said: {answer}" if isinstance(answer, str) else "supports() said no"


def _rows(tensors: Sequence[Any], facts: CallFacts) -> tuple[int, int] | None:
    if facts.rows is not None or not tensors:
        return facts.rows
    shape = tensors[0].shape[:-1]
    if not all(type(size) is int for size in shape):
        return None
    return prod(shape), prod(shape)
