"""Which steps of a plan belong to which layers of a model: read off the numbers in the names that the steps bind.

"model.layers.3.mlp.up_proj.weight" belongs to layer 3 of the stack "model.layers". A piece without such a name belongs
to the layer of the step before it, and what follows on a layer's opaque op has that layer's end in it. An opaque op
that names no layer may begin one or end one: it counts as a layer's only where that layer goes on after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from piecework.bundle.plan import OpStep, PieceStep, Plan


@dataclass(frozen=True)
class Layer:
    """A layer of a stack.

    Args:
        number: in its stack.
        steps: numbers of the plan's steps that it has part in, in order.
        own: numbers of the steps that run a piece and count as this layer's; see `LayerStack`.
    """

    number: int
    steps: tuple[int, ...]
    own: tuple[int, ...]


@dataclass(frozen=True)
class LayerStack:
    """Layers that are numbered side by side.

    Where opaque ops stand inside layers, a piece reaches from the end of one layer into the next. It has both layers in
    its `holders` and counts as the former's own. What leads into the first layer is nobody's own then: it is `entry`.

    Args:
        name: "model.layers"; "" where the module itself is the stack.
        layers: in order of their numbers.
        holders: for each of the plan's steps, the numbers of the layers that have part in it, in execution order.
        spans: whether any piece belongs to more than one layer.
        entry: number of the step that ends inside the first layer, or None.
    """

    name: str
    layers: tuple[Layer, ...]
    holders: tuple[tuple[int, ...], ...]
    spans: bool
    entry: int | None


def find_stacks(plan: Plan) -> tuple[LayerStack, ...]:
    """Return the stacks of a plan's model in execution order; a list with one numbered element is none."""
    names = [step_names(plan, step) for step in range(len(plan.steps))]
    numbers: dict[str, set[int]] = {}
    for name in (*(recipe.name for recipe in plan.recipes), *(state.name for state in plan.states)):
        for prefix, number in _numbered(name):
            numbers.setdefault(prefix, set()).add(number)
    several = {prefix for prefix, found in numbers.items() if len(found) > 1}
    owners: dict[str, list[tuple[int, ...]]] = {}
    for step, found in enumerate(names):
        for prefix, number in filter(None, (_outermost(name, several) for name in found)):
            holders = owners.setdefault(prefix, [()] * len(names))
            holders[step] = holders[step] if number in holders[step] else (*holders[step], number)
    return tuple(_stack(plan, prefix, _filled(plan, holders)) for prefix, holders in owners.items())


def step_names(plan: Plan, step: int) -> tuple[str, ...]:
    """Return the names of weights, states and layers that a step binds, in the order of first use."""
    found = plan.steps[step]
    if isinstance(found, PieceStep):
        names = [made.name for made in plan.captured_constants(plan.instances[found.instance])]
    else:
        names = [n for value in op_arguments(found).values() for n in _bound_names(plan, value)]
    return tuple(dict.fromkeys(names))


def op_arguments(step: OpStep) -> dict[int | str, Any]:
    """Return an opaque op's arguments by position or name, as the plan writes them."""
    made: dict[int | str, Any] = dict(enumerate(step.args))
    made.update(step.kwargs.items())
    return made


def layer_of_name(name: str, stack: str) -> int | None:
    """Return the layer of a stack that a tensor belongs to by its name, or None."""
    rest = name.removeprefix(f"{stack}." if stack else "")
    number = rest.split(".")[0]
    return int(number) if (not stack or rest != name) and number.isdecimal() else None


def _bound_names(plan: Plan, value: Any) -> Iterator[str]:
    match value:
        case {"recipe": int(index)}:
            yield plan.recipes[index].name
        case {"state": int(index)}:
            yield plan.states[index].name
        case {"layer": str(name)} | {"const": str(name)}:
            yield name
        case {"list": [*items]}:
            for item in items:
                yield from _bound_names(plan, item)


def _numbered(name: str) -> Iterator[tuple[str, int]]:
    """Yield ("model.layers", 3) for "model.layers.3.up", for each number in the name, outermost first."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            yield ".".join(parts[:index]), int(part)


def _outermost(name: str, several: set[str]) -> tuple[str, int] | None:
    return next((found for found in _numbered(name) if found[0] in several), None)


def _filled(plan: Plan, holders: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Find the layers of steps that bind nothing of one, and of pieces that begin with another layer's end."""
    last = max(index for index, found in enumerate(holders) if found)
    filled: list[tuple[int, ...]] = []
    for index, found in enumerate(holders):
        before = filled[-1][-1:] if filled else ()
        if isinstance(plan.steps[index], OpStep):
            # an op that names no layer is a layer's own only where the layer goes on after it
            following = next((h for h in holders[index + 1 :] if h), ())
            filled.append(found or (before if set(before) & set(following) else ()))
            continue
        follows_op = index > 0 and isinstance(plan.steps[index - 1], OpStep)
        inside = index <= last or (follows_op and index == last + 1)
        joins = follows_op or not found
        filled.append((*before, *found) if inside and joins and not set(before) & set(found) else found)
    return tuple(filled)


def _stack(plan: Plan, name: str, holders: tuple[tuple[int, ...], ...]) -> LayerStack:
    steps: dict[int, list[int]] = {}
    for step, found in enumerate(holders):
        for number in found:
            steps.setdefault(number, []).append(step)
    pieces = [step for step, found in enumerate(holders) if found and isinstance(plan.steps[step], PieceStep)]
    spans = any(len(holders[step]) > 1 for step in pieces)
    entry = None
    if spans and len(holders[pieces[0]]) == 1 and sum(holders[p][0] == holders[pieces[0]][0] for p in pieces) > 1:
        entry = pieces[0]
    own: Mapping[int, list[int]] = {number: [] for number in steps}
    for step in pieces:
        if step != entry:
            own[holders[step][0]].append(step)
    layers = tuple(Layer(number, tuple(steps[number]), tuple(own[number])) for number in sorted(steps))
    return LayerStack(name, layers, holders, spans=spans, entry=entry)
