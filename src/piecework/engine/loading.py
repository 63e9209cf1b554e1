"""From a bundle to a model that an engine can run: its weights, and how many blocks its KV cache shall have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from piecework.bundle.plan import Plan
from piecework.engine.kv_memory import DEFAULT_FRACTION, Memory, memory_needs, num_blocks_in, num_blocks_of_bytes
from piecework.models.checkpoint import Checkpoint, TensorMeta, open_checkpoint, random_checkpoint
from piecework.spec.config import ModelConfig


@dataclass(frozen=True)
class CacheSize:
    """How large the KV cache shall be.

    Args:
        num_bytes: so many bytes; None for a fraction of what is free.
        fraction: of the memory that is free once the model is loaded; None for the device's default.
    """

    num_bytes: int | None = None
    fraction: float | None = None


def num_blocks_for_cache(plan: Plan, config: ModelConfig, size: CacheSize, *, device: str, memory: Memory) -> int:
    """Return the blocks of a KV cache of the size asked for; raises CapacityError where there is no room for any.

    Args:
        plan: of the bundle.
        config: of the model directory.
        size: what was asked for.
        device: device type that the model runs on.
        memory: as it was before the model was loaded.
    """
    needs = memory_needs(plan, config)
    if size.num_bytes is not None:
        return num_blocks_of_bytes(size.num_bytes, needs)
    fraction = DEFAULT_FRACTION[device] if size.fraction is None else size.fraction
    return num_blocks_in(memory, needs, fraction=fraction)


def open_weights(model_dir: Path, plan: Plan, *, random_seed: int | None = None) -> Checkpoint:
    """Return a model directory's weights, or random ones of the plan's shapes; raises WeightsError."""
    if random_seed is None:
        return open_checkpoint(model_dir)
    specs = {
        take.name: TensorMeta(take.shape, getattr(torch, recipe.dtype))
        for recipe in plan.recipes
        if not recipe.literal
        for take in recipe.takes
    }
    return random_checkpoint(specs, seed=random_seed)
