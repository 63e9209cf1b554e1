"""Weights of a directory's folders beside its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from piecework.models.folders import with_folders
from safetensors.torch import save_file

from piecework.errors import WeightsError
from piecework.models.checkpoint import open_checkpoint


def test_tensors_of_folders_are_named_after_them(tmp_path: Path) -> None:
    (tmp_path / "2_Dense").mkdir()
    save_file({"linear.bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"linear.bias": torch.ones(3)}, tmp_path / "2_Dense" / "model.safetensors")
    own = open_checkpoint(tmp_path)
    assert with_folders(own, tmp_path, ()) is own
    both = with_folders(own, tmp_path, ["2_Dense"])
    assert sorted(both.names()) == ["2_Dense/linear.bias", "linear.bias"]
    assert both.get("linear.bias").tolist() == [0, 0]
    assert both.get("2_Dense/linear.bias").tolist() == [1, 1, 1]
    with pytest.raises(WeightsError, match="3_Dense"):
        with_folders(own, tmp_path, ["3_Dense"])
    with pytest.raises(WeightsError, match=r"linear\.weight"):
        both.get("2_Dense/linear.weight")
