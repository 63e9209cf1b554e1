"""Sizes at which a plan is looked at: the ends of the declared ranges, and some in between."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        path: the forward; each point is a batch that comes to it.
        bounds: of the primary size.
        seed: what the points in between depend on.

    Points at which a size that is computed would be negative belong to no batch, and are left out. Raises ValueError
    where hardly any are left.
    """
    groups = _groups(plan, path, bounds=bounds)
    if groups is None:
        return []
    candidates: list[Point] = []
    for candidate in _candidates(plan, groups, seed=seed):
        if candidate not in candidates:
            candidates.append(candidate)
    computed = [[_is_size(size, point) for point in candidates] for size in _computed(path)]
    sizes = [each for each in computed if any(each)]  # a number that is never a size is no size
    points = [point for i, point in enumerate(candidates) if all(each[i] for each in sizes)]
    if len(points) < (1 if len(candidates) < _TRIES // 2 else 3):
        raise ValueError("sizes that are computed from the others are below 0 nearly everywhere")
    return points[:_POINTS]


_Span = tuple[int, int]
"""The least and the greatest of some values that follow one another."""

_Group = tuple[tuple[str, ...], list[_Span]]
"""Sizes that are equal, and the values that they may have."""


def _groups(plan: Plan, path: PlanVariant, *, bounds: _Span) -> list[_Group] | None:
    """Return the sizes in groups of equal ones; None where no value is possible."""
    group: dict[str, set[str]] = {name: {name} for name in plan.sizes}
    for size, other in path.where.equal:
        merged = group[size] | group[other]
        group.update(dict.fromkeys(merged, merged))
    taken = _taken(plan, path)
    if taken is None:
        return None
    limits = [*((name, *limit) for name, limit in plan.sizes.items()), *path.where.within]
    limits += [(plan.primary, *bounds)] if plan.primary in plan.sizes else []
    found = []
    for names in {tuple(sorted(names)): None for names in group.values()}:
        own = [(low, high) for name, low, high in limits if name in names]
        spans = [(max(low for low, _ in own), min(high for _, high in own))]
        for name, low, high in taken:
            if name in names:
                spans = [part for span in spans for part in _without(span, low, high)]
        spans = [span for span in spans if span[0] <= span[1]]
        if not spans:
            return None
        found.append((names, spans))
    return found


def _without(span: _Span, low: int, high: int) -> list[_Span]:
    """Return what is left of a span where the values from `low` to `high` are taken away; some of it may be empty."""
    return [(span[0], min(span[1], low - 1)), (max(span[0], high + 1), span[1])] if low <= high else [span]


def _taken(plan: Plan, path: PlanVariant) -> list[tuple[str, int, int]] | None:
    """Return sizes and the values that never reach a forward, because one that comes first takes them; None: all.

    That is so where all else that the first one asks for is true of every batch that the forward is for.
    """
    known = {**plan.sizes, **{name: (low, high) for name, low, high in path.where.within}}
    taken = []
    for sooner in plan.variants:
        if sooner.name == path.name:
            break
        if not set(sooner.where.equal) <= set(path.where.equal):
            continue
        asked = [
            (name, low, high)
            for name, low, high in sooner.where.within
            if not low <= known[name][0] <= known[name][1] <= high
        ]
        if not asked:
            return None
        taken += asked if len(asked) == 1 else []
    return taken


def _candidates(plan: Plan, groups: list[_Group], *, seed: str) -> Iterator[Point]:
    def point(values: Iterable[int]) -> Point:
        return {name: value for (names, _), value in zip(groups, values, strict=True) for name in names}

    chosen = random.Random(seed)
    spans = []
    for _, several in groups:
        small = [span for span in several if span[0] <= _GREATEST] or several[:1]
        spans.append([(low, max(low, min(high, _GREATEST))) for low, high in small])
    yield point(several[0][0] for several in spans)
    yield point(several[-1][1] for several in spans)
    for _ in range(_TRIES if plan.sizes else 0):
        yield point(_value(several, chosen.random()) for several in spans)


def _value(spans: Sequence[_Span], place: float) -> int:
    """Return the value at a place from 0 to 1 among those of some spans."""
    left = int(place * sum(high - low + 1 for low, high in spans))
    for low, high in spans:
        if left <= high - low:
            return low + left
        left -= high - low + 1
    return spans[-1][1]


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
