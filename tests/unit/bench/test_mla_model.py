"""A DeepSeek of any shape, as a directory in Hugging Face layout."""

from pathlib import Path

import pytest
import torch

from piecework.bench.mla_model import deepseek_shapes, write_deepseek
from piecework.bench.random_models import RANDOM_MODELS, TINY_LATENT
from piecework.engine.text.tokenizer import load_tokenizer
from piecework.models.adapter import build_causal_lm
from piecework.models.checkpoint import open_checkpoint
from piecework.spec.config import read_config
from piecework.spec.model_spec import ModelSpec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RANDOM_MODELS["mla-tiny"].write(tmp_path_factory.mktemp("models") / "m", dtype="bfloat16")


def test_the_config_is_read_as_it_was_meant(model: Path) -> None:
    config = read_config(model)
    assert (config.model_type, config.architecture) == ("deepseek_v2", "DeepseekV2ForCausalLM")
    assert (config.num_layers, config.num_heads, config.hidden_size, config.vocab_size) == (2, 2, 64, 1024)
    assert config.dtype == "bfloat16"
    assert config.latent is not None
    sizes = config.latent
    assert (sizes.kv_rank, sizes.rope_dim, sizes.nope_dim, sizes.value_dim, sizes.query_rank) == (32, 16, 32, 32, None)
    assert config.experts is None


def test_the_checkpoint_has_what_the_module_needs(model: Path) -> None:
    module = build_causal_lm(ModelSpec.of(model, max_tokens=16)).module
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert deepseek_shapes(TINY_LATENT, layers=2) == expected
    checkpoint = open_checkpoint(model)
    assert set(checkpoint.names()) == set(expected)
    checkpoint.check(expected)


def test_weights_may_be_left_out(tmp_path: Path) -> None:
    made = write_deepseek(tmp_path / "m", shape=TINY_LATENT, layers=1, dtype="float32", weights=False)
    assert sorted(path.name for path in made.iterdir()) == ["config.json", "tokenizer.json", "tokenizer_config.json"]


def test_it_has_a_tokenizer(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert tokenizer.decode(tokenizer.encode("The for statement")) == "The for statement"


def test_the_model_of_100_million_is_the_one_that_peers_are_measured_with() -> None:
    made = RANDOM_MODELS["mla-100m"]
    sizes = deepseek_shapes(made.shape, layers=made.layers)  # type: ignore[arg-type]
    assert sum(torch.Size(size).numel() for size in sizes.values()) == 138_240_768
    assert sizes["model.layers.11.self_attn.kv_a_proj_with_mqa.weight"] == (512 + 64, 768)
