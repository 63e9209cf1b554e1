"""A plan run on weights that belong to somebody else, who changes them in place or puts others in their place.

The pieces' instances are bound once for each set of weights. What an instance reads is mostly the weight itself, so
that changes are seen by themselves; only copies (packed, merged, made contiguous) have to be made again. So a call
looks whether a weight that was copied has changed: by torch's count of writes, by its address, and, because nothing
counts writes through `.data`, by a sample of its values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch

from piecework.bundle.plan import Plan, Recipe
from piecework.bundle.run.constants import as_source, make_constants, pack_constants
from piecework.bundle.run.loading import open_plan
from piecework.bundle.run.model import LoadedModel
from piecework.ops.ir.provider_order import ProviderOrder

_SAMPLE: Final = 64
_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class OpenedPlan:
    """A plan, and where its artifacts are; `literals` are constants that are nobody's weights."""

    plan: Plan
    path_of: Callable[[str], Path]
    order: ProviderOrder
    literals: Mapping[str, torch.Tensor]


@final
class FollowingModel:
    """Runs a plan on the weights of each call.

    Args:
        opened: the plan.
        names: of the weights, in the order in which calls give them.
    """

    def __init__(self, opened: OpenedPlan, names: Sequence[str]) -> None:
        self._opened = opened
        self._names = tuple(names)
        self._bound: dict[tuple[int, ...], _Bound] = {}

    def run(self, values: Mapping[str, Any], weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the flat results for named inputs, with the weights as they are now."""
        key = tuple(map(id, weights))
        bound = self._bound.get(key)
        changed = None if bound is None else bound.watch.changed(weights)
        if bound is None or changed:
            bound = self._bound[key] = self._bind(weights, before=bound, changed=changed or ())
        return bound.model.run(values)

    def _bind(self, weights: Sequence[torch.Tensor], *, before: _Bound | None, changed: Collection[int]) -> _Bound:
        """Bind weights to instances; of those that were bound before, only what is made of changed ones is made."""
        plan = self._opened.plan
        stale = {self._names[i] for i in changed}
        source = as_source({name: w.detach() for name, w in zip(self._names, weights, strict=True)})
        device = plan.pieces[0].device if plan.pieces else "cpu"
        constants: list[torch.Tensor | None] = [None] * len(plan.recipes)
        if before is not None:
            for i, recipe in enumerate(plan.recipes):
                if stale.isdisjoint(take.name for take in recipe.takes):
                    constants[i] = before.constants[i]
        missing = [i for i, constant in enumerate(constants) if constant is None]
        recipes = [plan.recipes[i] for i in missing]
        made = make_constants(recipes, source=source, literals=self._opened.literals, device=device)
        pack_constants(recipes, made)
        for i, constant in zip(missing, made, strict=True):
            constants[i] = constant
        whole = [constant for constant in constants if constant is not None]
        model = open_plan(plan, path_of=self._opened.path_of, constants=whole, order=self._opened.order)
        copied = _copied(plan.recipes, whole, dict(zip(self._names, weights, strict=True)))
        return _Bound(model, whole, _Watch(weights, copied), self._last_as_long_as(weights))

    def _last_as_long_as(self, weights: Sequence[torch.Tensor]) -> Sequence[weakref.ref[torch.Tensor]]:
        """Return references that let go of what is bound to some weights when one of those ends."""
        bound, key = weakref.ref(self), tuple(map(id, weights))

        def forget(_weight: weakref.ref[torch.Tensor]) -> None:
            model = bound()
            if model is not None:
                model._bound.pop(key, None)

        return [weakref.ref(weight, forget) for weight in weights]


def _copied(
    recipes: Sequence[Recipe], constants: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> set[int]:
    """Return the weights, by their position, of which some constant is a copy."""
    positions = {name: i for i, name in enumerate(weights)}
    found = set()
    for recipe, constant in zip(recipes, constants, strict=True):
        for name in (take.name for take in recipe.takes if take.name in weights):
            if recipe.pack or recipe.source is not None or constant.data_ptr() != weights[name].data_ptr():
                found.add(positions[name])
    return found


@dataclass(frozen=True)
class _Bound:
    """A set of weights, bound."""

    model: LoadedModel
    constants: Sequence[torch.Tensor]
    watch: _Watch
    alive: Sequence[weakref.ref[torch.Tensor]]


@final
class _Watch:
    """Tells which weights are no longer what they were when it was made.

    Args:
        weights: all of them.
        copied: the positions of those of which something is a copy.
    """

    def __init__(self, weights: Sequence[torch.Tensor], copied: Collection[int]) -> None:
        self._addresses = [w.data_ptr() for w in weights]
        self._copied = sorted(copied)
        self._counts = [_writes(weights[i]) for i in self._copied]
        groups: dict[tuple[torch.dtype, torch.device], list[tuple[int, torch.Tensor]]] = {}
        for i in self._copied:
            sample = _sample(weights[i])
            groups.setdefault((sample.dtype, sample.device), []).append((i, sample))
        self._samples = [_Samples(group) for group in groups.values()]

    def changed(self, weights: Sequence[torch.Tensor]) -> set[int]:
        """Return the positions of the weights that have changed so that instances must be bound again."""
        found: set[int] = set()
        addresses = [w.data_ptr() for w in weights]
        if addresses != self._addresses:
            found.update(i for i, (a, b) in enumerate(zip(addresses, self._addresses, strict=True)) if a != b)
        counts = [_writes(weights[i]) for i in self._copied]
        if counts != self._counts:
            found.update(i for i, a, b in zip(self._copied, counts, self._counts, strict=True) if a != b)
        return found or {i for samples in self._samples for i in samples.changed()}


class _Samples:
    """Some values of each of several weights of one dtype, as bits, by which changes are noticed."""

    def __init__(self, samples: Sequence[tuple[int, torch.Tensor]]) -> None:
        self._positions = [position for position, _ in samples]
        self._parts = [part for _, part in samples]
        self._lengths = [len(part) for part in self._parts]
        self._values = torch.cat(self._parts)

    def changed(self) -> list[int]:
        """Return the positions of those that have changed."""
        values = torch.cat(self._parts)
        if torch.equal(values, self._values):
            return []
        pairs = zip(values.split(self._lengths), self._values.split(self._lengths), strict=True)
        return [i for i, (now, then) in zip(self._positions, pairs, strict=True) if not torch.equal(now, then)]


def _writes(weight: torch.Tensor) -> int:
    """Return torch's count of writes to a tensor; there is none of what was made in inference mode."""
    return -1 if weight.is_inference() else weight._version


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Return a view of some values, spread over the whole, as whole numbers of their bits."""
    bits = weight.detach().view(_BITS[weight.element_size()]) if weight.element_size() in _BITS else weight.detach()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(bits.shape, bits.stride(), strict=True))
    step = max(1, extent // _SAMPLE)
    return bits.as_strided((min(extent, _SAMPLE),), (step,)) if bits.numel() else bits.flatten()
