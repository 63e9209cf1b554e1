"""How the parameters of transformers' models are made of checkpoints that name and divide them in another way.

transformers describes that itself, for its own loader (`conversion_mapping.py`): tensors that have another name, and
experts whose matrices lie apart and are stacked. Both are recipes here; what else there may be is left, and a
checkpoint that needs it lacks a tensor then.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from piecework.bundle.recipes import Concat, Source, Sources, Stack, Take


def checkpoint_sources(module: nn.Module) -> Sources:
    """Say how those parameters of a transformers' model are made that a checkpoint may have in another form."""
    mapping = get_model_conversion_mapping(module, add_legacy=False)
    renamings = [m.reverse_transform() for m in reversed(mapping) if isinstance(m, WeightRenaming)]
    stacks = [m for m in mapping if isinstance(m, WeightConverter) and _is_stack(m)]
    sources: dict[str, Source] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False) if mapping else ():
        shape = tuple(parameter.shape)
        source = next((s for m in stacks if (s := _stacked(m, name, shape, renamings)) is not None), None)
        if source is None and (other := _as_stored(name, renamings)) != name:
            source = Take(other, shape, also=name)
        if source is not None:
            sources[name] = source
    return sources


def _is_stack(converter: WeightConverter) -> bool:
    """Whether it stacks matrices [a, b] of experts to [E, a, b], several after one another along a or not."""
    steps = converter.operations
    stacked = len(converter.target_patterns) == 1 and isinstance(steps[0], MergeModulelist) and steps[0].dim == 0
    joined = len(steps) == 2 and isinstance(steps[1], Concatenate) and steps[1].dim == 1
    return stacked and (joined or (len(steps) == 1 and len(converter.source_patterns) == 1))


def _stacked(
    converter: WeightConverter, name: str, shape: tuple[int, ...], renamings: Sequence[WeightTransform]
) -> Source | None:
    """Return how a converter makes a parameter, or None where it makes another one."""
    (target,) = converter.target_patterns
    if not name.endswith(target) or len(shape) != 3:
        return None
    count, rows, width = shape
    prefix, parts = name.removesuffix(target), converter.source_patterns
    takes = [Take(_as_stored(f"{prefix}{_plain(part)}", renamings), (rows // len(parts), width)) for part in parts]
    return Stack(takes[0] if len(takes) == 1 else Concat(tuple(takes)), count, whole=name)


def _plain(pattern: str) -> str:
    """Return a pattern's text without what only a regular expression needs."""
    return pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")


def _as_stored(name: str, renamings: Sequence[WeightTransform]) -> str:
    """Return what checkpoints call the tensor of a parameter, by renamings from the model's names to theirs."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name
