"""Sizes at which a plan is looked at: the ends of the declared ranges, and some in between."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any, Final

from piecework.bundle.plan import OpStep, Plan, PlanVariant
from piecework.bundle.sizes import Size, size_expression

Point = Mapping[str, int]
"""A value for each of a plan's sizes."""

_POINTS: Final = 4
_TRIES: Final = 24
_GREATEST: Final = 1 << 22
"""Shapes of greater sizes have more elements than torch counts."""


def sample_sizes(plan: Plan, path: PlanVariant, *, bounds: tuple[int, int], seed: str) -> list[Point]:
    """Return up to four points of the ranges in which a forward runs.

    Args:
        plan: the plan.
        path: the forward; what is equal in its batches is equal in each point.
        bounds: of the primary size.
        seed: what the points in between depend on.

    Points at which a size that is computed would be negative belong to no batch, and are left out. Raises ValueError
    where hardly any are left.
    """
    ranges = _ranges(plan, path, bounds=bounds)
    if ranges is None:
        return []
    candidates: list[Point] = []
    for candidate in _candidates(plan, ranges, seed=seed):
        if candidate not in candidates:
            candidates.append(candidate)
    computed = [[_is_size(size, point) for point in candidates] for size in _computed(path)]
    sizes = [each for each in computed if any(each)]  # a number that is never a size is no size
    points = [point for i, point in enumerate(candidates) if all(each[i] for each in sizes)]
    if len(points) < (1 if len(candidates) < _TRIES // 2 else 3):
        raise ValueError("sizes that are computed from the others are below 0 nearly everywhere")
    return points[:_POINTS]


_Group = tuple[tuple[str, ...], int, int]
"""Sizes that are equal, and the range of their value."""


def _ranges(plan: Plan, path: PlanVariant, *, bounds: tuple[int, int]) -> list[_Group] | None:
    """Return the sizes in groups of equal ones; None where no value is possible."""
    group: dict[str, set[str]] = {name: {name} for name in plan.sizes}
    limits = {name: [(low, high)] for name, (low, high) in plan.sizes.items()}
    if plan.primary in limits:
        limits[plan.primary].append(bounds)
    for size, other in path.equal:
        if isinstance(other, int):
            limits[size].append((other, other))
        else:
            merged = group[size] | group[other]
            group.update(dict.fromkeys(merged, merged))
    taken = _taken(plan, path)
    found = []
    for names in {tuple(sorted(names)): None for names in group.values()}:
        low = max(limit[0] for name in names for limit in limits[name])
        high = min(limit[1] for name in names for limit in limits[name])
        while any((name, low) in taken for name in names):
            low += 1
        if low > high:
            return None
        found.append((names, low, high))
    return found


def _taken(plan: Plan, path: PlanVariant) -> set[tuple[str, int]]:
    """Return (size, value) of what never reaches a forward, because one that comes first takes it."""
    taken = set()
    for sooner in plan.variants:
        if sooner.name == path.name:
            break
        rest = [pair for pair in sooner.equal if pair not in path.equal]
        if len(rest) == 1:
            ((size, other),) = rest
            if isinstance(other, int):
                taken.add((size, other))
    return taken


def _candidates(plan: Plan, ranges: list[_Group], *, seed: str) -> Iterator[Point]:
    def point(values: list[int]) -> Point:
        return {name: value for (names, _, _), value in zip(ranges, values, strict=True) for name in names}

    chosen = random.Random(seed)
    spans = [(low, max(low, min(high, _GREATEST)) - low + 1) for _, low, high in ranges]
    yield point([low for _, low, _ in ranges])
    yield point([max(low, min(high, _GREATEST)) for _, low, high in ranges])
    for _ in range(_TRIES if plan.sizes else 0):
        yield point([low + int(chosen.random() * span) for low, span in spans])


def _computed(path: PlanVariant) -> list[Size]:
    texts: dict[str, None] = {}

    def collect(argument: Mapping[str, Any]) -> None:
        if "size" in argument:
            texts[argument["size"]] = None
        for inner in argument.get("list", ()):
            collect(inner)

    for step in path.steps:
        if isinstance(step, OpStep):
            for argument in (*step.args, *step.kwargs.values()):
                collect(argument)
    return [size_expression(text) for text in texts]


def _is_size(size: Size, point: Point) -> bool:
    try:
        return size(point) >= 0
    except ZeroDivisionError:
        return False
