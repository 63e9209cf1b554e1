"""Which model a server serves, and how large its engine is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from piecework.engine.profile_options import ProfileOptions
from piecework.models.config import ModelConfig
from piecework.models.latent_config import DEFAULT_KV_CACHE_DTYPE, DEFAULT_MLA
from piecework.ops.ir.selection import ProviderOrder


class WhileCompiling(Enum):
    """What is done while a bundle is compiled: serve with the eager backend, or let clients wait."""

    EAGER = "eager"
    WAIT = "wait"


@dataclass(frozen=True)
class ModelOptions:
    """Which model is served, and how large.

    Args:
        config: the model directory's.
        dtype: type of weights and activations.
        device: "cpu" or "cuda".
        max_tokens: most tokens in one forward.
        max_seqs: most sequences in one forward; None for the most that the bundle takes.
        kv_memory: bytes of the KV cache; None for `memory_fraction` of free memory.
        memory_fraction: see `engine/kv_memory.py`; None for the device's default.
        prefix_caching: whether prompts' beginnings are shared.
        while_compiling: see WhileCompiling.
        bundle: use this one instead of the store's.
        random_weights: a seed; the directory then needs no safetensors.
        mla: "exposed" or "opaque", for models with latent attention.
        kv_cache_dtype: "auto", or "fp8" for models with latent attention.
        providers: which implementations IR ops have; None for the default, or for what `bundle` has.
        profile: which forwards of the model that serves first are profiled; None for none.
    """

    config: ModelConfig
    dtype: str
    device: str = "cpu"
    max_tokens: int = 2048
    max_seqs: int | None = None
    kv_memory: int | None = None
    memory_fraction: float | None = None
    prefix_caching: bool = True
    while_compiling: WhileCompiling = WhileCompiling.WAIT
    bundle: Path | None = None
    random_weights: int | None = None
    mla: str = DEFAULT_MLA
    kv_cache_dtype: str = DEFAULT_KV_CACHE_DTYPE
    providers: ProviderOrder | None = None
    profile: ProfileOptions | None = None
