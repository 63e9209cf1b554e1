"""Which files of a model directory hold its weights: model.safetensors, or shards by an index. They are not read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from piecework.errors import WeightsError
from piecework.spec.conversions import to_safetensors
from piecework.spec.other_models import gguf

_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """The files of weights.

    Attributes:
        paths: of the model's own.
        names: of tensors that must be in one of them, by the index.
        folders: those of folders with weights of their own, by the folder's name: tensors are "folder/name".
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...] = ()
    folders: Mapping[str, Path] = field(default_factory=dict)

    @property
    def prefixes(self) -> Mapping[Path, str]:
        """All files, each with what comes before its tensors' names."""
        return dict.fromkeys(self.paths, "") | {path: f"{folder}/" for folder, path in self.folders.items()}


def weight_files(model_dir: Path, folders: Sequence[str] = ()) -> WeightFiles:
    """Return the files of a directory's weights. Raises WeightsError where one is missing, or there are none.

    Args:
        model_dir: the directory.
        folders: its folders that have weights of their own.
    """
    inside = {folder: model_dir / folder / _SINGLE for folder in folders}
    index, single = model_dir / _INDEX, model_dir / _SINGLE
    if not index.exists():
        if not single.exists():
            raise _none(model_dir)
        return WeightFiles((single,), folders=inside)
    shard_of = _read_index(index)
    shards = tuple(model_dir / shard for shard in sorted(set(shard_of.values())))
    missing = [path for path in shards if not path.exists()]
    if missing:
        raise WeightsError(
            asked=f"weights from {missing[0]}",
            found=f"no such file; {index.name} names {len(shards)}, of which {len(missing)} are missing",
            try_="download the checkpoint again, with all its shards",
        )
    return WeightFiles(shards, tuple(shard_of), inside)


def damaged(path: Path, error: Exception) -> WeightsError:
    """Return the error about a file of weights that can't be read."""
    return WeightsError(
        asked=f"weights from {path}",
        found=f"the file is damaged or truncated: {error}",
        try_="download the file again",
    )


def _read_index(index: Path) -> dict[str, str]:
    """Return the shard of each tensor. Raises WeightsError where the index is broken, or leads out of its directory."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shard_of = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(index, error) from error
    for shard in shard_of.values():
        if Path(shard).name != shard:
            raise damaged(index, ValueError(f"a shard outside the directory: {shard}"))
    return shard_of


def _none(model_dir: Path) -> WeightsError:
    """Return the error about a directory without weights that piecework reads, with what it has instead."""
    found = f"neither {_SINGLE} nor {_INDEX}"
    try_ = "give a directory that holds them, or --random-weights SEED to try without"
    names = sorted(path.name for path in model_dir.iterdir()) if model_dir.is_dir() else []
    pickles = [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
    others = [name for name in names if name.endswith(".safetensors")]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if pickles:
        found = f"{pickles[0]}: a pickle, which may run code where it is read, and no safetensors"
        try_ = f"write safetensors beside it: {to_safetensors(model_dir)}"
    elif others:
        found += f"; what transformers doesn't read either: {', '.join(others[:3])}"
    elif ggufs:
        found, try_ = gguf(ggufs[0])
    return WeightsError(asked=f"the weights in {model_dir}", found=found, try_=try_)
