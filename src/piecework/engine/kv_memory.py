"""How many blocks the KV cache has: what memory leaves over once weights and activations have theirs.

Nothing here depends on how the model came to be: weights and activations are counted from the plan and the config, not
measured, and free memory is read before anything is loaded or compiled (which another process does). So a start after
a compile gives the same KV cache as one that found its bundle.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import torch

from piecework.bundle.plan import Plan
from piecework.bundle.sizes import size_expression
from piecework.errors import CapacityError
from piecework.ops.mla.plain import CONTEXT_CHUNK
from piecework.spec.config import ModelConfig
from piecework.spec.latent_config import LatentSizes

DEFAULT_FRACTION: Final = {"cpu": 0.5, "cuda": 0.9}
_STEPS: Final = 64
_CGROUP: Final = Path("/sys/fs/cgroup")
_MEMINFO: Final = Path("/proc/meminfo")


@dataclass(frozen=True)
class Memory:
    """Bytes of a device, or of what this process may use of it: all of them, and those that nobody uses."""

    total: int
    free: int


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that a model needs besides its KV cache, and for one block of it."""

    weights: int
    activations: int
    block: int


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
    left = memory.free // step * step - needs.weights - needs.activations
    num_blocks = int(fraction * left) // needs.block
    if num_blocks < 1:
        raise CapacityError(
            asked=f"a KV cache in {fraction:.0%} of what {_mib(memory.free)} of free memory leave",
            found=f"weights take {_mib(needs.weights)}, activations {_mib(needs.activations)}, a block "
            f"{_mib(needs.block)}",
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


def memory_needs(plan: Plan, config: ModelConfig) -> MemoryNeeds:
    """Return what a model needs, from its plan and config."""
    weights = sum(prod(r.shape) * _itemsize(r.dtype) for r in plan.recipes)
    block = sum(
        prod(size_expression(str(dim))({"blocks": 1}) for dim in state.shape) * _itemsize(state.dtype)
        for state in plan.states
    )
    itemsize = _activation_itemsize(plan)
    max_tokens, max_seqs = plan.sizes["tokens"][1], plan.sizes["seqs"][1]
    return MemoryNeeds(
        weights, activation_bytes(config, itemsize=itemsize, max_tokens=max_tokens, max_seqs=max_seqs), block
    )


def activation_bytes(config: ModelConfig, *, itemsize: int, max_tokens: int, max_seqs: int) -> int:
    """Return an upper estimate of what one forward holds at a time.

    Per token: the residual stream and the normed one, what attention and the MLP or the experts hold, each in the
    activations' type and once more in float32, as kernels convert. Per sequence: a row of logits, the same way.
    """
    per_token = 2 * config.hidden_size + _attention_numbers(config) + _mlp_numbers(config)
    rows = min(max_tokens, max_seqs)
    numbers = max_tokens * per_token + rows * config.vocab_size
    if config.latent is not None:
        # the queries and results of decode, which are latents; a chunk of context, gathered and expanded
        numbers += rows * 2 * config.num_heads * config.latent.kv_rank
        numbers += CONTEXT_CHUNK * (config.latent.entry + 2 * _expanded(config, config.latent))
    return numbers * (itemsize + 4)


def _attention_numbers(config: ModelConfig) -> int:
    """Return how many numbers per token attention holds: q, k, v and its result."""
    latent = config.latent
    if latent is None:
        return 2 * config.num_heads * config.head_dim + 2 * config.num_kv_heads * config.head_dim
    query = config.num_heads * (latent.nope_dim + 2 * latent.rope_dim)  # and the rotated part of it
    return query + 2 * latent.entry + _expanded(config, latent) + config.num_heads * latent.value_dim


def _expanded(config: ModelConfig, latent: LatentSizes) -> int:
    return config.num_heads * (latent.nope_dim + latent.value_dim)


def _mlp_numbers(config: ModelConfig) -> int:
    """Return how many numbers per token an MLP holds (gate, up and their product), or a layer of experts."""
    dense = 3 * int(config.raw.get("intermediate_size") or 4 * config.hidden_size)
    experts = config.experts
    if experts is None:
        return dense
    chosen = experts.top_k * (2 * config.hidden_size + 3 * experts.intermediate)
    return max(dense, chosen + 3 * experts.shared)


def _activation_itemsize(plan: Plan) -> int:
    """Return the bytes of a number of the activations, which is of the widest state's type.

    Where states are bytes, as caches in fp8 are, it is of the type that most weights have.
    """
    numbers = [s.dtype for s in plan.states if s.dtype != "uint8"]
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
