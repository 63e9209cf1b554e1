"""Which provider's implementation of an IR op is used: an order of providers as a value, and the rule that applies it.

    ProviderOrder(default=("native",), per_op={"rms_norm": ("triton", "native")})
    ProviderOrder.parse(["rms_norm=triton,native", "silu_mul[1:64]=triton,native", "@cuda=triton,native", "native"])

A compile lowers by an order that it is given and records; eager calls go by the one of the innermost `providers(order)`
block, which threads and async tasks don't share. Neither the ops nor this module keep a selection. The same variable
leads calls inside a loaded model's opaque ops, and inside `piecework.eager_ops`, to the bodies that their owner has.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Final, Protocol

from piecework.errors import OpError
from piecework.ops.ir.operator import Implementation, SelectableOp

NATIVE: Final = "native"
DEFAULT_PROVIDERS: Final = (NATIVE,)
IR_OPS: Final = (
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "silu_mul",
    "gelu_mul",
    "rotary",
    "rotate_pairs",
    "quantize_static_fp8",
    "quantize_dynamic_per_token",
    "quantize_group_fp8",
    "moe_route",
)
"""Names of our own ops that have providers; those of other packages are written "namespace::name"."""

_RULE: Final = re.compile(
    r"(?:(?:@(?P<device>\w+)|(?P<op>\w+(?:::\w+)?)(?:\[(?P<low>\d+):(?P<high>\d+)\])?)=)?(?P<providers>[\w,\s]*)"
)


@dataclass(frozen=True, order=True)
class RangeRule:
    """The providers of an op where a call's rows are all among `low` to `high`, ends included."""

    op: str
    low: int
    high: int
    providers: tuple[str, ...]


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


@dataclass(frozen=True)
class ProviderOrder:
    """In which order providers are tried. Hashable; equal orders have equal text.

    The most specific list that applies to a call is taken: of `ranges`, else of `per_op`, else of `per_device`, else
    `default`. Of that list, the first provider whose implementation supports the call. A list that should always have
    one ends with "native".

    Args:
        default: for every op.
        per_op: by the op's name: "rms_norm", or "namespace::name" for ops of other packages.
        ranges: for an op at some numbers of rows (tokens).
        per_device: by type of device, "cpu" or "cuda".

    Raises OpError for an unknown op, an empty list, or a name that can't be a provider's.
    """

    default: tuple[str, ...] = DEFAULT_PROVIDERS
    per_op: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ranges: tuple[RangeRule, ...] = ()
    per_device: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        per_op = {_op_name(op): tuple(names) for op, names in self.per_op.items()}
        per_device = {device: tuple(names) for device, names in self.per_device.items()}
        ranges = (RangeRule(_op_name(r.op), r.low, r.high, tuple(r.providers)) for r in self.ranges)
        object.__setattr__(self, "default", tuple(self.default))
        object.__setattr__(self, "per_op", dict(sorted(per_op.items())))
        object.__setattr__(self, "ranges", tuple(sorted(ranges)))
        object.__setattr__(self, "per_device", dict(sorted(per_device.items())))
        for names in (self.default, *per_op.values(), *per_device.values(), *(r.providers for r in self.ranges)):
            _check_names(names)
        for rule in self.ranges:
            _check_range(rule, self.ranges)

    def __hash__(self) -> int:
        return hash(self.text())

    @staticmethod
    def parse(rules: str | Sequence[str]) -> ProviderOrder:
        """Read what `--provider` takes, one rule an item: "rms_norm=triton,native".

        "OP[LOW:HIGH]=…" is for a range of rows, "@cuda=…" for a type of device, and a bare "triton,native" for all ops.
        One text may hold several rules, separated by ";", as `text` writes them. Raises OpError.
        """
        default: tuple[str, ...] = DEFAULT_PROVIDERS
        per_op: dict[str, tuple[str, ...]] = {}
        per_device: dict[str, tuple[str, ...]] = {}
        ranges: list[RangeRule] = []
        texts = [rules] if isinstance(rules, str) else rules
        for text in (part.strip() for whole in texts for part in whole.split(";")):
            found = _RULE.fullmatch(text)
            if found is None:
                raise OpError(
                    asked=f"the providers {text!r}",
                    found="no rule of that form",
                    try_='"rms_norm=triton,native", "rms_norm[1:64]=triton,native", "@cuda=triton,native" or "native"',
                )
            names = tuple(name.strip() for name in found["providers"].split(",") if name.strip())
            if found["device"]:
                per_device[found["device"]] = names
            elif found["low"]:
                ranges.append(RangeRule(found["op"], int(found["low"]), int(found["high"]), names))
            elif found["op"]:
                per_op[found["op"]] = names
            else:
                default = names
        return ProviderOrder(default, per_op, tuple(ranges), per_device)

    def text(self) -> str:
        """Return the order as one line that `parse` reads; equal orders give equal lines."""
        rules = [
            ",".join(self.default),
            *(f"@{device}={','.join(names)}" for device, names in self.per_device.items()),
            *(f"{op}={','.join(names)}" for op, names in self.per_op.items()),
            *(f"{rule.op}[{rule.low}:{rule.high}]={','.join(rule.providers)}" for rule in self.ranges),
        ]
        return ";".join(rules)

    def to_json(self) -> str:
        """Return what `from_json` reads."""
        return self.text()

    @staticmethod
    def from_json(data: str) -> ProviderOrder:
        """Read what `to_json` wrote. Raises OpError."""
        return ProviderOrder.parse(data)

    @property
    def names(self) -> tuple[str, ...]:
        """Every provider that is named, each once."""
        lists = (self.default, *self.per_device.values(), *self.per_op.values(), *(r.providers for r in self.ranges))
        return tuple(dict.fromkeys(name for names in lists for name in names))

    def resolve(
        self,
        op: SelectableOp,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        facts: CallFacts = _NOTHING_KNOWN,
    ) -> Choice:
        """Return the implementation for a call of `op`, and why each other one was not taken.

        Args:
            op: the op.
            args, kwargs: the call's; tensors may be fake, with symbolic sizes.
            facts: what else is known.

        Raises OpError where none of the providers supports the call.
        """
        given = kwargs or {}
        tensors = [a for a in (*args, *given.values()) if hasattr(a, "shape")]
        device = str(tensors[0].device.type) if tensors else ""
        names, rejected = self._candidates(op.short_name, device=device, rows=_rows(tensors, facts))
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
        self, op: str, *, device: str, rows: tuple[int, int] | None
    ) -> tuple[tuple[str, ...], list[Rejected]]:
        """Return the list that applies, and providers of lists that apply to a part of the rows only."""
        rejected: list[Rejected] = []
        for rule in self.ranges:
            if rule.op != op or rows is None:
                continue
            if rule.low <= rows[0] and rows[1] <= rule.high:
                return rule.providers, []
            if rule.low <= rows[1] and rows[0] <= rule.high:
                why = f"asked for {rule.low} to {rule.high} rows, the call may have {rows[0]} to {rows[1]}"
                rejected += [Rejected(name, why) for name in rule.providers if name != NATIVE]
        names = self.per_op.get(op) or self.per_device.get(device) or self.default
        return names, [r for r in rejected if r.provider not in names]


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


def as_order(value: ProviderOrder | str | Sequence[str] | None) -> ProviderOrder:
    """Return an order, its text, a list of rules, or None (for the default) as an order. Raises OpError."""
    if value is None:
        return ProviderOrder()
    return value if isinstance(value, ProviderOrder) else ProviderOrder.parse(value)


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


def _op_name(name: str) -> str:
    """Return an op's name as orders write it: without "piecework::"."""
    short = name.removeprefix("piecework::")
    if "::" not in short and short not in IR_OPS:
        raise OpError(
            asked=f"providers for the op {name!r}",
            found="no op of that name",
            try_=f'one of {", ".join(IR_OPS)}, or "namespace::name" for an op of another package',
        )
    return short


def _check_names(names: Sequence[str]) -> None:
    wrong = [name for name in names if not name.isidentifier()]
    if not names or wrong or len(set(names)) != len(names):
        raise OpError(
            asked=f"the providers {','.join(names) or '(none)'}",
            found=f"{wrong[0]!r}, which is no name" if wrong else "one twice" if names else "an empty list",
            try_='names such as "triton,native"',
        )


def _check_range(rule: RangeRule, rules: Sequence[RangeRule]) -> None:
    if rule.high < rule.low:
        raise OpError(asked=f"{rule.low} to {rule.high} rows of {rule.op}", found="an empty range", try_="LOW <= HIGH")
    for other in rules:
        if other is not rule and other.op == rule.op and rule.low <= other.high and other.low <= rule.high:
            raise OpError(
                asked=f"providers of {rule.op} for {rule.low} to {rule.high} rows",
                found=f"others for {other.low} to {other.high}",
                try_="ranges that don't overlap",
            )
