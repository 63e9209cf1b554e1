"""How many blocks the KV cache has: what memory leaves over once weights and activations have theirs.

Nothing here depends on how the model came to be: weights and activations are counted from the plan and the config, not
measured, and free memory is read before anything is loaded or compiled (which another process does). So a start after
a compile gives the same KV cache as one that found its bundle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import torch

from piecework.bundle.plan import OpStep, Plan, Recipe, State
from piecework.bundle.sizes import size_expression
from piecework.errors import CapacityError
from piecework.models.batch import STATE_SLOTS
from piecework.ops.mla.plain import CONTEXT_CHUNK
from piecework.spec.config import ModelConfig

DEFAULT_FRACTION: Final = {"cpu": 0.5, "cuda": 0.9}
_STEPS: Final = 64
_CHOSEN: Final = 8  # experts of a token, where config.json has no name for it that is known here
_CGROUP: Final = Path("/sys/fs/cgroup")
_MEMINFO: Final = Path("/proc/meminfo")


@dataclass(frozen=True)
class Memory:
    """Bytes of a device, or of what this process may use of it: all of them, and those that nobody uses."""

    total: int
    free: int


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that a model needs besides its KV cache, and for one block of it.

    `states` are recurrent states, of all sequences that may run.
    """

    weights: int
    activations: int
    block: int
    states: int = 0


def read_memory(device: str) -> Memory:
    """Return the memory of a device type, "cpu" or "cuda"; on the host within the limit of this process's cgroup."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return Memory(total=total, free=free)
    host = _read_meminfo(_MEMINFO)
    limited = _read_cgroup(_CGROUP)
    if limited is None:
        return host
    return Memory(total=min(host.total, limited.total), free=min(host.free, limited.free))


def num_blocks_in(memory: Memory, needs: MemoryNeeds, *, fraction: float) -> int:
    """Return the blocks that `fraction` of the memory gives which is free once the model is loaded.

    Free memory counts in steps of a 64th of all memory, so that a few megabytes more or less of other processes change
    nothing.

    Raises CapacityError where not even one block is left.
    """
    step = max(1, memory.total // _STEPS)
    left = memory.free // step * step - needs.weights - needs.activations - needs.states
    num_blocks = int(fraction * left) // needs.block
    if num_blocks < 1:
        raise CapacityError(
            asked=f"a KV cache in {fraction:.0%} of what {_mib(memory.free)} of free memory leave",
            found=f"weights take {_mib(needs.weights)}, activations {_mib(needs.activations)}, recurrent states "
            f"{_mib(needs.states)}, a block {_mib(needs.block)}",
            try_="free memory, take a larger fraction or fewer tokens per forward, or give the KV cache's bytes",
        )
    return num_blocks


def num_blocks_of_bytes(num_bytes: int, needs: MemoryNeeds) -> int:
    """Return the blocks that fit into a KV cache of so many bytes; raises CapacityError where none does."""
    if num_bytes < needs.block:
        raise CapacityError(
            asked=f"a KV cache of {_mib(num_bytes)}", found=f"one block takes {_mib(needs.block)}", try_="more memory"
        )
    return num_bytes // needs.block


def has_slots(state: State) -> bool:
    """Whether a state has a slot for each sequence, as recurrent ones have, and not blocks."""
    return STATE_SLOTS in state.shape


def memory_needs(plan: Plan, config: ModelConfig, *, max_seqs: int) -> MemoryNeeds:
    """Return what a model needs, from its plan and config, where so many sequences may run."""
    weights = sum(prod(r.shape) * _itemsize(r.dtype) for r in plan.recipes)
    sizes = {"blocks": 1, STATE_SLOTS: max_seqs}
    num_bytes = {False: 0, True: 0}
    for state in plan.states:
        shape = (size_expression(str(dim))(sizes) for dim in state.shape)
        num_bytes[has_slots(state)] += prod(shape) * _itemsize(state.dtype)
    return MemoryNeeds(weights, activation_bytes(plan, config), num_bytes[False], num_bytes[True])


def activation_bytes(plan: Plan, config: ModelConfig) -> int:
    """Return an upper estimate of what one forward holds at a time.

    Per token: the residual stream and the normed one, and what the widest step makes of it, a number per row of each
    of its matrices; with experts, of those that a token chooses. In the activations' type and once more in float32, as
    kernels convert. Per sequence: a row of logits, the same way.
    """
    max_tokens, max_seqs = plan.sizes["tokens"][1], plan.sizes["seqs"][1]
    hidden = max((r.shape[1] for r in plan.recipes if _is_of_tokens(r, config)), default=0)
    steps = [sum(_rows(plan.recipes[i], config) for i in instance.constants) for instance in plan.instances]
    chosen = int(config.raw.get("num_experts_per_tok") or _CHOSEN)
    taken = [[plan.recipes[i] for i in _recipes_of(step)] for step in plan.steps if isinstance(step, OpStep)]
    of_ops = [sum(_rows(recipe, config, most=chosen) for recipe in recipes) for recipes in taken]
    rows = min(max_tokens, max_seqs)
    numbers = max_tokens * (2 * hidden + max([*steps, *of_ops], default=0)) + rows * config.vocab_size
    if config.latent is not None:
        # the queries and results of decode, which are latents; a chunk of context, gathered and expanded
        heads = int(config.raw.get("num_attention_heads") or 128)
        expanded = heads * (config.latent.nope_dim + config.latent.value_dim)
        numbers += max_tokens * expanded + rows * 2 * heads * config.latent.kv_rank
        numbers += CONTEXT_CHUNK * (config.latent.entry + 2 * expanded)
    return numbers * (_activation_itemsize(plan) + 4)


def _rows(recipe: Recipe, config: ModelConfig, *, most: int | None = None) -> int:
    """Return how many numbers per token come of multiplying with a constant; of several matrices with `most` of them.

    In a piece a token goes through all of them, as through each head's, or Llama 4's experts.
    """
    if len(recipe.shape) == 3:
        count, *sides = recipe.shape
        return (count if most is None else min(most, count)) * max(sides)
    return recipe.shape[0] if len(recipe.shape) == 2 and not _is_of_tokens(recipe, config) else 0


def _is_of_tokens(recipe: Recipe, config: ModelConfig) -> bool:
    """Whether a constant has a row for each token of the vocabulary."""
    return len(recipe.shape) == 2 and recipe.shape[0] == config.vocab_size


def _recipes_of(step: OpStep) -> list[int]:
    """Return the constants that an opaque op takes."""
    given = [*step.args, *step.kwargs.values()]
    return [g["recipe"] for g in given if isinstance(g, Mapping) and "recipe" in g]


def _activation_itemsize(plan: Plan) -> int:
    """Return the bytes of a number of the activations, which is of the widest KV cache's type.

    Where these are bytes, as caches in fp8 are, it is of the type that most weights have.
    """
    numbers = [s.dtype for s in plan.states if s.dtype != "uint8" and not has_slots(s)]
    if plan.states and not numbers:
        weights = Counter[str]()
        for recipe in plan.recipes:
            weights[recipe.dtype] += prod(recipe.shape)
        numbers = [dtype for dtype, _ in weights.most_common(1)]
    return max(map(_itemsize, numbers), default=4)


def _itemsize(dtype: str) -> int:
    made: torch.dtype = getattr(torch, dtype)
    return made.itemsize


def _read_meminfo(path: Path) -> Memory:
    """Return the host's memory; what the page cache could give back counts as free."""
    fields = {}
    try:
        for line in path.read_text().splitlines():
            name, _, rest = line.partition(":")
            fields[name] = int(rest.split()[0]) * 1024
        return Memory(total=fields["MemTotal"], free=fields["MemAvailable"])
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CapacityError(
            asked="the size of the KV cache from free memory",
            found=f"this system doesn't say how much is free: {error}",
            try_="give the KV cache's bytes",
        ) from error


def _read_cgroup(root: Path) -> Memory | None:
    """Return the limit of a container (cgroup version 2) and what is left of it, or None without one."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        total = int(limit)  # "max" where there is none
        cache = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    except (OSError, ValueError):
        return None
    return Memory(total=total, free=max(0, total - used + cache))


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
