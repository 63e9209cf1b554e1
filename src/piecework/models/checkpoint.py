"""Weights by name: from safetensors files, from memory, or random."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError
from torch import Tensor

from piecework.errors import WeightsError
from piecework.foundation.digests import digest_bytes
from piecework.models.weight_check import Wanted, find_wanted, open_file
from piecework.spec.weight_files import damaged, weight_files

_RANDOM_STD: Final = 0.02
_ROWS_COMPARED: Final = 8
_NONE: Final[Mapping[str, str]] = {}


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


def open_checkpoint(
    model_dir: Path, wanted: Sequence[Wanted] = (), *, folders: Sequence[str] = ()
) -> SafetensorsCheckpoint:
    """Open the safetensors of a model directory, in one file or sharded by model.safetensors.index.json.

    Args:
        model_dir: the directory.
        wanted: what will be taken of them; it is found under other names too, see models/weight_check.py.
        folders: of the directory, which have weights of their own.

    Raises WeightsError where files are missing or damaged, something wanted isn't there as it is wanted, or there is a
    head that isn't the embedding, while the model has one tensor for both.
    """
    files = weight_files(model_dir, folders)
    names = find_wanted(files, wanted)
    checkpoint = SafetensorsCheckpoint(files.prefixes, renamed=names.renamed)
    if names.untied:
        _check_tied(checkpoint, *names.untied)
    return checkpoint


@final
class SafetensorsCheckpoint(Checkpoint):
    """Tensors of safetensors files, mapped into memory and read when used.

    Args:
        paths: the files, or a mapping of each to what is put before its tensors' names.
        renamed: the files' name of each tensor that is asked for under another one.

    Raises WeightsError where a file is missing or damaged.
    """

    def __init__(self, paths: Iterable[Path] | Mapping[Path, str], *, renamed: Mapping[str, str] = _NONE) -> None:
        self._files: dict[str, tuple[Path, Any, str]] = {}
        self._renamed = renamed
        for path, prefix in (paths if isinstance(paths, Mapping) else dict.fromkeys(paths, "")).items():
            handle = open_file(path, framework="pt")
            for name in handle.keys():  # noqa: SIM118  a handle is no mapping
                self._files[f"{prefix}{name}"] = (path, handle, name)

    def names(self) -> Sequence[str]:
        """Return the names of all tensors, file by file, and the other ones that they go by."""
        return [*self._files, *self._renamed]

    def get(self, name: str) -> Tensor:
        """Return a tensor whose memory is the mapped file; raises WeightsError where there is none."""
        path, handle, inside = self._find(name)
        try:
            tensor: Tensor = handle.get_tensor(inside)
        except SafetensorError as error:
            raise damaged(path, error) from error
        return tensor

    def _find(self, name: str) -> tuple[Path, Any, str]:
        found = self._files.get(self._renamed.get(name, name))
        if found is None:
            raise _missing(name, [path.name for path in dict.fromkeys(path for path, _, _ in self._files.values())])
        return found


@final
class RandomCheckpoint(Checkpoint):
    """Tensors made up on demand, each from the seed and its own name, so that the order of use doesn't matter.

    Biases are zeros, norms' weights ones, whole numbers anything, all else normal with standard deviation 0.02.
    """

    def __init__(self, specs: Mapping[str, TensorMeta], *, seed: int) -> None:
        self._specs = dict(specs)
        self._seed = seed

    def names(self) -> Sequence[str]:
        """Return the names of all tensors."""
        return list(self._specs)

    def get(self, name: str) -> Tensor:
        """Return the tensor, made anew; raises WeightsError where there is none."""
        if name not in self._specs:
            raise _missing(name, ["random weights"])
        spec = self._specs[name]
        if name.endswith("bias"):
            return torch.zeros(spec.shape, dtype=spec.dtype)
        if len(spec.shape) < 2:
            return torch.ones(spec.shape, dtype=spec.dtype)
        seed = int(digest_bytes(f"{self._seed}:{name}".encode())[:15], 16)
        generator = torch.Generator().manual_seed(seed)
        if not spec.dtype.is_floating_point:
            limits = torch.iinfo(spec.dtype)
            return torch.randint(limits.min, limits.max, spec.shape, dtype=spec.dtype, generator=generator)
        # made in float32 whatever the dtype, so that every dtype gets the same weights
        values = torch.empty(math.prod(spec.shape), dtype=torch.float32).normal_(0, _RANDOM_STD, generator=generator)
        return values.view(spec.shape).to(spec.dtype)


def random_checkpoint(specs: Mapping[str, TensorMeta], *, seed: int) -> RandomCheckpoint:
    """Return random weights of the given shapes, the same for the same seed."""
    return RandomCheckpoint(specs, seed=seed)


def _missing(name: str, places: Sequence[str]) -> WeightsError:
    return WeightsError(
        asked=f"tensor {name}",
        found=f"no such tensor in {', '.join(places)}",
        try_="use the checkpoint that belongs to this config.json",
    )


def _check_tied(checkpoint: Checkpoint, head: str, *alike: str) -> None:
    """Raise WeightsError where a head differs from all tensors of its shape, of which some rows are compared."""
    wanted = checkpoint.get(head)
    rows = torch.linspace(0, wanted.shape[0] - 1, _ROWS_COMPARED).long()
    if not any(torch.equal(checkpoint.get(name)[rows].float(), wanted[rows].float()) for name in alike):
        raise WeightsError(
            asked=f"a model whose head is its embedding ({alike[0]}), as its config has it",
            found=f"a {head} with other values",
            try_='"tie_word_embeddings": false in config.json, if the model was trained so',
        )
