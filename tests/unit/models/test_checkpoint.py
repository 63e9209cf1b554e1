"""Checkpoints: by name, mapped, sharded, damaged, in memory, random."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from piecework.errors import WeightsError
from piecework.models.checkpoint import (
    SafetensorsCheckpoint,
    TensorMeta,
    open_checkpoint,
    random_checkpoint,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(1, 2)}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    shards = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({n: TENSORS[n] for n in "bc"}, tmp_path / "two.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return tmp_path


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_by_name(layout: str, request: pytest.FixtureRequest) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(layout))
    assert sorted(checkpoint.names()) == ["a", "b", "c"]
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.get(name), tensor)


def test_a_tensor_lies_in_the_mapped_file(single: Path) -> None:
    tensor = open_checkpoint(single).get("a")
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("model.safetensors"):
            low, high = line.split()[0].split("-")
            regions.append((int(low, 16), int(high, 16)))
    assert any(low <= begin and end <= high for low, high in regions)


@pytest.mark.parametrize("length", [0, 4, 40, -1])
def test_a_truncated_file_is_refused(single: Path, length: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(WeightsError, match=r"damaged or truncated") as error:
        open_checkpoint(single)
    assert str(path) in error.value.asked


def test_a_missing_shard_is_refused(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"two\.safetensors"):
        open_checkpoint(sharded)


def test_a_shard_without_its_tensor_is_refused(sharded: Path) -> None:
    save_file({"c": TENSORS["c"]}, sharded / "two.safetensors")
    with pytest.raises(WeightsError, match="tensor b"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../one.safetensors"}}'])
def test_a_broken_index_is_refused(sharded: Path, index: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=r"index\.json"):
        open_checkpoint(sharded)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="--random-weights"):
        open_checkpoint(tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        SafetensorsCheckpoint([tmp_path / "none.safetensors"])


def random_tensor(name: str, *, seed: int = 0, shape: tuple[int, ...] = (64, 64), dtype: str = "float32") -> Tensor:
    specs = {name: TensorMeta(shape, getattr(torch, dtype)), "other.weight": TensorMeta((3, 3), torch.float32)}
    return random_checkpoint(specs, seed=seed).get(name)


def test_random_weights_depend_on_seed_and_name_only() -> None:
    first = random_tensor("x.weight")
    assert torch.equal(first, random_tensor("x.weight"))
    assert not torch.equal(first, random_tensor("y.weight"))
    assert not torch.equal(first, random_tensor("x.weight", seed=1))
    assert torch.equal(first.to(torch.bfloat16), random_tensor("x.weight", dtype="bfloat16"))
    assert abs(first.std().item() - 0.02) < 0.001


def test_random_norms_are_ones_and_biases_zeros() -> None:
    assert torch.equal(random_tensor("x.norm.weight", shape=(5,)), torch.ones(5))
    assert torch.equal(random_tensor("x.q_proj.bias", shape=(5,)), torch.zeros(5))


def test_a_missing_tensor_is_refused() -> None:
    with pytest.raises(WeightsError, match="tensor x"):
        random_checkpoint({}, seed=0).get("x")
