import json
from pathlib import Path

import pytest
import torch

from piecework.bench.synthetic import ModelShape, weight_shapes, write_llama
from piecework.engine.text.tokenizer import load_tokenizer
from piecework.errors import RequestError
from piecework.models.adapter import build_causal_lm
from piecework.models.checkpoint import open_checkpoint
from piecework.spec.config import read_config
from piecework.spec.model_spec import ModelSpec

SHAPE = ModelShape(hidden=32, heads=2, intermediate=48, vocab=300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "m", shape=SHAPE, layers=2, dtype="bfloat16")


def test_the_config_is_read_as_it_was_meant(model: Path) -> None:
    config = read_config(model)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 2, 2, 16)
    assert (config.hidden_size, config.vocab_size, config.dtype) == (32, 300, "bfloat16")
    assert not config.tie_word_embeddings


def test_the_checkpoint_has_what_the_module_needs(model: Path) -> None:
    module = build_causal_lm(ModelSpec.of(model, max_tokens=16)).module
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert weight_shapes(SHAPE, layers=2) == expected
    checkpoint = open_checkpoint(model)
    assert set(checkpoint.names()) == set(expected)
    checkpoint.check(expected)


def test_weights_are_the_same_each_time_and_in_each_dtype(model: Path, tmp_path: Path) -> None:
    again = write_llama(tmp_path / "again", shape=SHAPE, layers=2, dtype="bfloat16")
    assert (again / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    other = open_checkpoint(write_llama(tmp_path / "other", shape=SHAPE, layers=2, dtype="float32"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(other.get(name).to(torch.bfloat16), open_checkpoint(model).get(name))
    assert other.get(name).std() > 0


@pytest.mark.parametrize("text", ["The for statement", "é × 漢\n"])
def test_the_tokenizer_gives_text_back_byte_by_byte(model: Path, text: str) -> None:
    tokenizer = load_tokenizer(model)
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text


def test_every_token_of_the_vocabulary_is_there(model: Path) -> None:
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(SHAPE.vocab))


@pytest.mark.parametrize("sizes", [{"hidden": 30, "heads": 4}, {"hidden": 12, "heads": 4}, {"vocab": 257}])
def test_shapes_that_no_model_has(sizes: dict[str, int]) -> None:
    with pytest.raises(RequestError):
        ModelShape(**sizes)
