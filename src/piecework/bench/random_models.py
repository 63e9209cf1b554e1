"""Models with random weights that benchmarks know by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from piecework.bench.synthetic import ModelShape, write_llama

LLAMA: Final = "llama-"


@dataclass(frozen=True)
class RandomModel:
    """A Llama of `layers` layers and a shape."""

    name: str
    layers: int
    shape: ModelShape

    def write(self, directory: Path, *, dtype: str) -> Path:
        """Write config, weights of a fixed seed and a tokenizer into a new directory, and return it."""
        return write_llama(directory, shape=self.shape, layers=self.layers, dtype=dtype)


_MODELS: Final = (
    RandomModel("llama-tiny", 2, ModelShape(hidden=64, heads=2, intermediate=128, vocab=1024)),
    RandomModel("llama-100m", 12, ModelShape(hidden=768, heads=12, intermediate=2048, vocab=32000)),
)
RANDOM_MODELS: Final[Mapping[str, RandomModel]] = {model.name: model for model in _MODELS}
