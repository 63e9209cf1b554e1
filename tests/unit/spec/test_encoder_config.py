"""What a directory says of an encoder, and what can't be served of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from piecework.errors import CompileError, UnsupportedModelError
from piecework.spec.config import read_config
from piecework.spec.encoder_config import Dense, Task
from piecework.spec.model_spec import ModelSpec
from tests.unit.models.encoders import DENSE, NORMALIZE, POOLING, write_encoder, write_plain
from tests.unit.models.tiny import write_config


def test_a_sentence_transformers_directory(tmp_path: Path) -> None:
    write_encoder(tmp_path, pooling="cls", rest=[DENSE, NORMALIZE])
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    config = read_config(tmp_path)
    encoder = config.encoder
    assert encoder is not None
    assert (config.task, encoder.poolings, encoder.normalize, encoder.longest) == (Task.EMBED, ("cls",), True, 48)
    assert encoder.dense == (Dense("2_Dense", 32, 20, bias=True, activation="Tanh"),)
    assert (encoder.prompts, encoder.default_prompt) == ({"query": "query: "}, "query")


def test_poolings_as_old_directories_name_them(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    said = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(said))
    encoder = read_config(tmp_path).encoder
    assert encoder is not None
    assert encoder.poolings == ("cls", "mean")


def test_a_plain_encoder_gives_means_of_texts_as_long_as_its_tokenizer_says(tmp_path: Path) -> None:
    encoder = read_config(write_plain(tmp_path, architectures=["BertForMaskedLM"])).encoder
    assert encoder is not None
    assert (encoder.poolings, encoder.normalize, encoder.longest) == (("mean",), False, 40)


@pytest.mark.parametrize(
    ("fields", "activation"),
    [
        ({}, "Sigmoid"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "Identity"),
    ],
)
def test_a_cross_encoder_has_one_label(tmp_path: Path, fields: dict[str, Any], activation: str) -> None:
    of_pairs = {"architectures": ["BertForSequenceClassification"], **fields}
    config = read_config(write_plain(tmp_path, **of_pairs, id2label={"0": "LABEL_0"}))
    assert config.task is Task.SCORE
    assert config.encoder is not None
    assert config.encoder.activation == activation
    with pytest.raises(UnsupportedModelError, match="classifier with 3 labels"):
        read_config(write_plain(tmp_path, **of_pairs, id2label={"0": "a", "1": "b", "2": "c"}))


def test_a_language_model_is_no_encoder(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, "llama"))
    assert (config.task, config.encoder) == (Task.GENERATE, None)


@pytest.mark.parametrize(
    ("modules", "found"),
    [
        ([{"type": "sentence_transformers.models.CLIPModel", "path": ""}], "CLIPModel"),
        ([{"type": "theirs.Transformer", "path": ""}, POOLING], "whose code isn't"),
        ([{"type": "sentence_transformers.models.Transformer", "path": ""}], "no Pooling"),
        ([{"type": "sentence_transformers.models.Transformer", "path": ""}, NORMALIZE], "Normalize"),
        ([{"type": "sentence_transformers.models.Transformer", "path": "../elsewhere"}], "elsewhere"),
        ({"no": "list"}, "can't be read"),
    ],
)
def test_other_modules_are_refused(tmp_path: Path, modules: Any, found: str) -> None:
    write_encoder(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedModelError) as error:
        read_config(tmp_path)
    assert found in error.value.found


@pytest.mark.parametrize(
    ("said", "found"),
    [({"pooling_mode": "median"}, "median"), ({"include_prompt": False}, "leaves the prompt's tokens out")],
)
def test_other_poolings_are_refused(tmp_path: Path, said: dict[str, Any], found: str) -> None:
    write_encoder(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(said))
    with pytest.raises(UnsupportedModelError) as error:
        read_config(tmp_path)
    assert found in error.value.found


def test_what_an_encoder_gives_is_a_fact_and_its_texts_fit_in_a_forward(tmp_path: Path) -> None:
    plain, normalized = (write_encoder(tmp_path / str(n), rest=[NORMALIZE] * n) for n in (0, 1))
    one, other = ModelSpec.of(plain), ModelSpec.of(normalized)
    assert one.key != other.key
    assert {fact.name: fact.value for fact in other.named.facts} == {"encoder": "mean, normalize", "text tokens": 48}
    assert one.key == ModelSpec.of(write_encoder(tmp_path / "other", max_position_embeddings=32)).key
    long = write_encoder(tmp_path / "long", max_position_embeddings=8192)
    (long / "sentence_bert_config.json").write_text('{"max_seq_length": 8000}')
    assert ModelSpec.of(long).max_tokens == 8000
    with pytest.raises(CompileError, match="forward passes of 512 tokens"):
        ModelSpec.of(long, max_tokens=512)
