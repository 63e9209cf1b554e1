"""Weights of a directory's folders beside its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from piecework.errors import WeightsError
from piecework.models.checkpoint import open_checkpoint
from piecework.models.weight_check import read_headers
from piecework.spec.weight_files import weight_files


def test_tensors_of_folders_are_named_after_them(tmp_path: Path) -> None:
    (tmp_path / "2_Dense").mkdir()
    save_file({"linear.bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"linear.bias": torch.ones(3)}, tmp_path / "2_Dense" / "model.safetensors")
    headers = read_headers(weight_files(tmp_path, ["2_Dense"]))
    assert {name: header.shape for name, header in headers.items()} == {
        "linear.bias": (2,),
        "2_Dense/linear.bias": (3,),
    }
    both = open_checkpoint(tmp_path, folders=["2_Dense"])
    assert sorted(both.names()) == ["2_Dense/linear.bias", "linear.bias"]
    assert both.get("linear.bias").tolist() == [0, 0]
    assert both.get("2_Dense/linear.bias").tolist() == [1, 1, 1]
    with pytest.raises(WeightsError, match=r"linear\.weight"):
        both.get("2_Dense/linear.weight")
    with pytest.raises(WeightsError, match="3_Dense"):
        open_checkpoint(tmp_path, folders=["3_Dense"])
