"""Weights of a model directory's folders: those of sentence-transformers' Dense modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

from torch import Tensor

from piecework.models.checkpoint import Checkpoint, SafetensorsCheckpoint, TensorMeta


def with_folders(checkpoint: Checkpoint, model_dir: Path, folders: Sequence[str]) -> Checkpoint:
    """Return a directory's checkpoint with the tensors of its folders, named "folder/name".

    Raises WeightsError where a folder's model.safetensors is missing or damaged.
    """
    return _WithFolders(checkpoint, model_dir, folders) if folders else checkpoint


@final
class _WithFolders(Checkpoint):
    def __init__(self, checkpoint: Checkpoint, model_dir: Path, folders: Sequence[str]) -> None:
        self._own = checkpoint
        self._parts = {folder: SafetensorsCheckpoint([model_dir / folder / "model.safetensors"]) for folder in folders}

    def names(self) -> Sequence[str]:
        inside = [f"{folder}/{name}" for folder, part in self._parts.items() for name in part.names()]
        return [*self._own.names(), *inside]

    def get(self, name: str) -> Tensor:
        checkpoint, own_name = self._find(name)
        return checkpoint.get(own_name)

    def meta(self, name: str) -> TensorMeta:
        checkpoint, own_name = self._find(name)
        return checkpoint.meta(own_name)

    def _find(self, name: str) -> tuple[Checkpoint, str]:
        folder, _, inside = name.partition("/")
        part = self._parts.get(folder)
        return (self._own, name) if part is None else (part, inside)
