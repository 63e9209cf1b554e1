"""Models of any shape, as directories in Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common.models import RANDOM_MODELS, LlamaShape, RandomModel
from piecework.engine.text.tokenizer import load_tokenizer
from piecework.errors import RequestError
from piecework.models.adapter import build_causal_lm
from piecework.models.checkpoint import open_checkpoint
from piecework.spec.config import read_config
from piecework.spec.model_spec import ModelSpec


@pytest.fixture(scope="module", params=["llama-tiny", "mla-tiny"])
def random(request: pytest.FixtureRequest) -> RandomModel:
    return RANDOM_MODELS[request.param]


@pytest.fixture(scope="module")
def model(random: RandomModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random.write(tmp_path_factory.mktemp("models") / "m", dtype="bfloat16")


def test_the_config_is_read_as_it_was_meant(model: Path, random: RandomModel) -> None:
    config = read_config(model)
    assert [config.raw[n] for n in ("num_hidden_layers", "num_attention_heads", "hidden_size")] == [2, 2, 64]
    assert config.vocab_size == 1024
    assert config.dtype == "bfloat16"
    assert not config.tie_word_embeddings
    assert config.experts is None
    assert (config.latent is not None) == random.name.startswith("mla")
    if config.latent is not None:
        sizes = config.latent
        assert (sizes.kv_rank, sizes.rope_dim, sizes.nope_dim, sizes.value_dim) == (32, 16, 32, 32)


def test_the_checkpoint_has_what_the_module_needs(model: Path, random: RandomModel) -> None:
    module = build_causal_lm(ModelSpec.of(model, max_tokens=16)).module
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert random.shape.weights(layers=random.layers) == expected
    checkpoint = open_checkpoint(model)
    assert {name: tuple(checkpoint.get(name).shape) for name in checkpoint.names()} == expected


def test_weights_are_the_same_each_time_and_in_each_dtype(model: Path, random: RandomModel, tmp_path: Path) -> None:
    again = random.write(tmp_path / "again", dtype="bfloat16")
    assert (again / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    other = open_checkpoint(random.write(tmp_path / "other", dtype="float32"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(other.get(name).to(torch.bfloat16), open_checkpoint(model).get(name))
    assert other.get(name).std() > 0


def test_weights_may_be_left_out(random: RandomModel, tmp_path: Path) -> None:
    made = random.write(tmp_path / "m", dtype="float32", weights=False)
    assert sorted(path.name for path in made.iterdir()) == ["config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("text", ["The for statement", "é × 漢\n"])
def test_the_tokenizer_gives_text_back_byte_by_byte(model: Path, text: str) -> None:
    tokenizer = load_tokenizer(model)
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(1024))


@pytest.mark.parametrize("sizes", [{"hidden": 30, "heads": 4}, {"hidden": 12, "heads": 4}, {"vocab": 257}])
def test_shapes_that_no_model_has(sizes: dict[str, int]) -> None:
    with pytest.raises(RequestError):
        LlamaShape(**sizes)


def test_the_model_of_100_million_is_the_one_that_peers_are_measured_with() -> None:
    made = RANDOM_MODELS["mla-100m"]
    sizes = made.shape.weights(layers=made.layers)
    assert sum(torch.Size(size).numel() for size in sizes.values()) == 138_240_768
    assert sizes["model.layers.11.self_attn.kv_a_proj_with_mqa.weight"] == (512 + 64, 768)
