"""Which model a server serves, and how large its engine is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from piecework.engine.profile_options import ProfileOptions
from piecework.spec.model_spec import ModelSpec


class WhileCompiling(Enum):
    """What is done while a bundle is compiled: serve with the eager backend, or let clients wait."""

    EAGER = "eager"
    WAIT = "wait"


@dataclass(frozen=True)
class ModelOptions:
    """Which model is served, and how large.

    Args:
        spec: which model, compiled how.
        max_seqs: most sequences in one forward; None for the most that the bundle takes.
        kv_memory: bytes of the KV cache; None for `memory_fraction` of free memory.
        memory_fraction: see `engine/kv_memory.py`; None for the device's default.
        prefix_caching: whether prompts' beginnings are shared.
        while_compiling: see WhileCompiling.
        bundle: use this one instead of the store's.
        random_weights: a seed; the directory then needs no safetensors.
        profile: which forwards of the model that serves first are profiled; None for none.
    """

    spec: ModelSpec
    max_seqs: int | None = None
    kv_memory: int | None = None
    memory_fraction: float | None = None
    prefix_caching: bool = True
    while_compiling: WhileCompiling = WhileCompiling.WAIT
    bundle: Path | None = None
    random_weights: int | None = None
    profile: ProfileOptions | None = None
