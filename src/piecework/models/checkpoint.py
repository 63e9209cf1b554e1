"""Weights by name: from safetensors files, from memory, or random."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from piecework.errors import WeightsError
from piecework.foundation.digests import digest_bytes
from piecework.spec.weight_files import damaged, weight_files

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_RANDOM_STD: Final = 0.02


@dataclass(frozen=True)
class TensorMeta:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint(ABC):
    """Tensors by name. Implementations: `SafetensorsCheckpoint`, `RandomCheckpoint`."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Return the names of all tensors."""

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """Return a tensor; raises WeightsError where there is none or it can't be read."""

    @abstractmethod
    def meta(self, name: str) -> TensorMeta:
        """Return a tensor's shape and dtype without reading it; raises WeightsError where there is none."""

    def check(self, expected: Mapping[str, Sequence[int]]) -> None:
        """Raise WeightsError unless every tensor of `expected` (name -> shape) is there and has that shape."""
        for name, shape in expected.items():
            found = self.meta(name).shape
            if found != tuple(shape):
                raise WeightsError(
                    asked=f"tensor {name} with shape {tuple(shape)}",
                    found=f"shape {found}",
                    try_="use the checkpoint that belongs to this config.json",
                )


def open_checkpoint(model_dir: Path) -> SafetensorsCheckpoint:
    """Open the safetensors of a model directory, in one file or sharded by model.safetensors.index.json.

    Raises WeightsError where files are missing or damaged.
    """
    files = weight_files(model_dir)
    return SafetensorsCheckpoint(files.paths, complete=files.names)


@final
class SafetensorsCheckpoint(Checkpoint):
    """Tensors of safetensors files, mapped into memory and read when used.

    Args:
        paths: the files.
        complete: names that must be in one of them.

    Raises WeightsError where a file is missing or damaged, or a name of `complete` is in none.
    """

    def __init__(self, paths: Iterable[Path], *, complete: Iterable[str] = ()) -> None:
        self._files: dict[str, tuple[Path, Any]] = {}
        for path in paths:
            handle = _open(path)
            for name in handle.keys():  # noqa: SIM118  a handle is no mapping
                self._files[name] = (path, handle)
        for name in complete:
            self._find(name)

    def names(self) -> Sequence[str]:
        """Return the names of all tensors, file by file."""
        return list(self._files)

    def get(self, name: str) -> Tensor:
        """Return a tensor whose memory is the mapped file; raises WeightsError where there is none."""
        path, handle = self._find(name)
        try:
            tensor: Tensor = handle.get_tensor(name)
        except SafetensorError as error:
            raise damaged(path, error) from error
        return tensor

    def meta(self, name: str) -> TensorMeta:
        """Return a tensor's shape and dtype from its file's header; raises WeightsError where there is none."""
        piece = self._find(name)[1].get_slice(name)
        return TensorMeta(tuple(piece.get_shape()), _DTYPES[piece.get_dtype()])

    def _find(self, name: str) -> tuple[Path, Any]:
        if name not in self._files:
            raise _missing(name, [path.name for path, _ in dict.fromkeys(self._files.values())])
        return self._files[name]


@final
class RandomCheckpoint(Checkpoint):
    """Tensors made up on demand, each from the seed and its own name, so that the order of use doesn't matter.

    Biases are zeros, norms' weights ones, everything else normal with standard deviation 0.02.
    """

    def __init__(self, specs: Mapping[str, TensorMeta], *, seed: int) -> None:
        self._specs = dict(specs)
        self._seed = seed

    def names(self) -> Sequence[str]:
        """Return the names of all tensors."""
        return list(self._specs)

    def get(self, name: str) -> Tensor:
        """Return the tensor, made anew; raises WeightsError where there is none."""
        spec = self.meta(name)
        if name.endswith("bias"):
            return torch.zeros(spec.shape, dtype=spec.dtype)
        if len(spec.shape) < 2:
            return torch.ones(spec.shape, dtype=spec.dtype)
        seed = int(digest_bytes(f"{self._seed}:{name}".encode())[:15], 16)
        generator = torch.Generator().manual_seed(seed)
        # made in float32 whatever the dtype, so that every dtype gets the same weights
        values = torch.empty(math.prod(spec.shape), dtype=torch.float32).normal_(0, _RANDOM_STD, generator=generator)
        return values.view(spec.shape).to(spec.dtype)

    def meta(self, name: str) -> TensorMeta:
        """Return a tensor's shape and dtype; raises WeightsError where there is none."""
        if name not in self._specs:
            raise _missing(name, ["random weights"])
        return self._specs[name]


def random_checkpoint(specs: Mapping[str, TensorMeta], *, seed: int) -> RandomCheckpoint:
    """Return random weights of the given shapes, the same for the same seed."""
    return RandomCheckpoint(specs, seed=seed)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise WeightsError(
            asked=f"weights from {path}",
            found="no such file",
            try_="download the checkpoint again, with all its shards",
        ) from error
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error


def _missing(name: str, places: Sequence[str]) -> WeightsError:
    return WeightsError(
        asked=f"tensor {name}",
        found=f"no such tensor in {', '.join(places)}",
        try_="use the checkpoint that belongs to this config.json",
    )
