"""What differs between the calls of one opaque op: it stands in the plan, not in compiled code, so it costs nothing.

A name (of a layer, or any string or integer) that differs between calls is *lifted* where the op is a step of the plan,
and *baked in* where the call stands inside a piece: then each value makes a piece of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from piecework.bundle.plan import OpStep, PieceStep, Plan
from piecework.foundation.digests import canonical_json
from piecework.report.layers import op_arguments
from piecework.report.listing import argument_label
from piecework.report.subject import ExplainedPlan

_KINDS: Final[Mapping[str, str]] = {"layer": "layer name", "state": "state", "recipe": "weight"}
_COMPUTED: Final = frozenset({"slot", "size", "list"})
_TORCHS: Final = frozenset({"aten", "prims", "prim", "mkldnn", "quantized", "operator", "torch", "math"})


@dataclass(frozen=True)
class LiftedArgument:
    """An argument of an opaque op that differs between its calls.

    Args:
        label: "argument 4 (layer)".
        kind: "layer name", "constant", "state" or "weight".
        num_values: how many different ones there are.
        examples: the first ones.
    """

    label: str
    kind: str
    num_values: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class OpLifting:
    """An opaque op: how many of the plan's steps call it, from which source lines, and what differs between them."""

    op: str
    num_calls: int
    locations: tuple[str, ...]
    lifted: tuple[LiftedArgument, ...]


@dataclass(frozen=True)
class NameCounts:
    """How many calls take a name that differs between calls: lifted out of compiled code, and baked into it."""

    lifted: int
    baked: int


def lift_report(subject: ExplainedPlan) -> tuple[OpLifting, ...]:
    """Return the plan's opaque ops in the order of their first calls."""
    steps: dict[str, list[OpStep]] = {}
    for step in subject.plan.steps:
        if isinstance(step, OpStep):
            steps.setdefault(step.op, []).append(step)
    known = subject.explanation
    return tuple(
        OpLifting(
            op=op,
            num_calls=len(calls),
            locations=tuple(known.op_locations.get(op, ())) if known else (),
            lifted=tuple(_lifted(subject.plan, calls, names=op_argument_names(subject, op))),
        )
        for op, calls in steps.items()
    )


def count_names(subject: ExplainedPlan) -> NameCounts:
    """Count the calls that take a name which differs between the calls of their operator."""
    lifted: dict[str, list[list[Any]]] = {}
    for step in subject.plan.steps:
        if isinstance(step, OpStep):
            lifted.setdefault(step.op, []).append([v for v in op_arguments(step).values() if _is_name(v)])
    baked: dict[str, list[list[Any]]] = {}
    for piece in _runs(subject):
        for call in subject.explanation.listings[piece].program.calls if subject.explanation else ():
            if call.target.split(".")[0] not in _TORCHS:
                names = [{"const": v} for v in (*call.args, *call.kwargs.values())]
                baked.setdefault(call.target, []).append([v for v in names if _is_name(v)])
    return NameCounts(sum(map(_count_differing, lifted.values())), sum(map(_count_differing, baked.values())))


def op_argument_names(subject: ExplainedPlan, op: str) -> Sequence[str]:
    """Return the names of an opaque op's arguments, or () where they aren't known."""
    return subject.explanation.op_arguments.get(op, ()) if subject.explanation else ()


def label_of(key: int | str, *, names: Sequence[str]) -> str:
    """Return how to name an argument: "argument 4 (layer)"."""
    return argument_label(key, names=names) if isinstance(key, int) else f"argument {key}"


def show_argument(plan: Plan, value: Mapping[str, Any]) -> str:
    """Write a bound argument of an opaque op for people: a name, a constant, or a weight's name."""
    match value:
        case {"recipe": int(index)}:
            return plan.recipes[index].name
        case {"state": int(index)}:
            return plan.states[index].name
        case {"layer": str(name)}:
            return repr(name)
        case {"const": constant}:
            return repr(constant)
    return str(value)


def is_bound(value: Any) -> bool:
    """Whether an argument is bound when the bundle is loaded, and not computed or passed from call to call."""
    return isinstance(value, Mapping) and not _COMPUTED & set(value)


def _lifted(plan: Plan, calls: Sequence[OpStep], *, names: Sequence[str]) -> Iterator[LiftedArgument]:
    arguments = [op_arguments(call) for call in calls]
    for key in arguments[0]:
        values = {canonical_json(given[key]): given[key] for given in arguments if is_bound(given.get(key))}
        if len(values) < 2 and not any("layer" in value for value in values.values()):
            continue
        shown = [show_argument(plan, value) for value in values.values()]
        kind = next((word for tag, word in _KINDS.items() if tag in next(iter(values.values()))), "constant")
        yield LiftedArgument(label_of(key, names=names), kind, len(values), tuple(shown[:2]))


def _is_name(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return "layer" in value or type(value.get("const")) in (str, int)


def _count_differing(calls: Sequence[Sequence[Any]]) -> int:
    """Return how many calls there are if any of their names differs, else 0; layers' own handles always count."""
    handles = sum(any("layer" in value for value in names) for names in calls)
    return len(calls) if len({canonical_json(names) for names in calls}) > 1 else handles


def _runs(subject: ExplainedPlan) -> Iterator[int]:
    for step, found in enumerate(subject.plan.steps):
        if isinstance(found, PieceStep):
            yield subject.piece(step)
