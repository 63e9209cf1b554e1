"""Reading config.json: what is taken from it, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from piecework.errors import UnsupportedModelError
from piecework.spec.config import read_config
from tests.unit.models.tiny import config_dict, write_config


def test_reads_the_sizes(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, "qwen3", torch_dtype="bfloat16"))
    assert (config.vocab_size, config.max_positions) == (131, 512)
    assert (config.model_type, config.architecture, config.dtype) == ("qwen3", "Qwen3ForCausalLM", "bfloat16")
    assert config.eos_token_ids == (2,)


@pytest.mark.parametrize("name", ["n_positions", "max_seq_len"])
def test_the_longest_sequence_has_several_names(tmp_path: Path, name: str) -> None:
    assert read_config(write_config(tmp_path, "llama", max_position_embeddings=None, **{name: 77})).max_positions == 77


@pytest.mark.parametrize(("value", "expected"), [(5, (5,)), ([5, 7], (5, 7)), (None, ())])
def test_stop_tokens_come_from_the_generation_config(tmp_path: Path, value: Any, expected: tuple[int, ...]) -> None:
    write_config(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert read_config(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model_type": None}, "no model_type"),
        ({"model_type": ["llama"]}, "llama"),
        ({"architectures": None}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "a classifier with 2 labels"),
        ({"architectures": ["LlamaForTokenClassification"]}, "neither a causal language model nor an encoder"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method None"),
        ({"vocab_size": None}, "lacks a field"),
        ({"dtype": "float8"}, "float8"),
    ],
)
def test_what_cannot_be_compiled_is_refused(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        read_config(write_config(tmp_path, "llama", **changes))
    assert found in error.value.found
    assert error.value.try_


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\x00\xff"])
def test_a_broken_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("directory", [".", "nowhere"])
def test_a_missing_file_is_refused(tmp_path: Path, directory: str) -> None:
    with pytest.raises(UnsupportedModelError, match="Hugging Face layout"):
        read_config(tmp_path / directory)


def test_reading_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_dict("llama")))
    code = (
        "import sys, pathlib; from piecework.spec.config import read_config; "
        f"read_config(pathlib.Path({str(tmp_path)!r})); "
        "raise SystemExit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
