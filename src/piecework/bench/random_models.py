"""Models with random weights that benchmarks know by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from piecework.bench.mla_model import LatentShape, write_deepseek
from piecework.bench.synthetic import ModelShape, write_llama

LLAMA: Final = "llama-"


@dataclass(frozen=True)
class RandomModel:
    """A model of `layers` layers and a shape: a Llama, or a DeepSeek-V2 where that is of latent attention."""

    name: str
    layers: int
    shape: ModelShape | LatentShape

    def write(self, directory: Path, *, dtype: str) -> Path:
        """Write config, weights of a fixed seed and a tokenizer into a new directory, and return it."""
        if isinstance(self.shape, LatentShape):
            return write_deepseek(directory, shape=self.shape, layers=self.layers, dtype=dtype)
        return write_llama(directory, shape=self.shape, layers=self.layers, dtype=dtype)


TINY_LATENT: Final = LatentShape(
    hidden=64, heads=2, intermediate=128, vocab=1024, kv_rank=32, rope=16, nope=32, value=32
)
_MODELS: Final = (
    RandomModel("llama-tiny", 2, ModelShape(hidden=64, heads=2, intermediate=128, vocab=1024)),
    RandomModel("llama-100m", 12, ModelShape(hidden=768, heads=12, intermediate=2048, vocab=32000)),
    RandomModel("mla-tiny", 2, TINY_LATENT),
    RandomModel("mla-100m", 12, LatentShape(hidden=768, heads=6, intermediate=2048, vocab=32000)),
)
RANDOM_MODELS: Final[Mapping[str, RandomModel]] = {model.name: model for model in _MODELS}
