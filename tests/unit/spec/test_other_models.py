"""What is given for a model and is none, or not yet: each says what it is, and the command that helps."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from piecework.engine.text.tokenizer import load_tokenizer
from piecework.errors import UnsupportedModelError, WeightsError
from piecework.spec.config import read_config
from piecework.spec.weight_files import weight_files
from tests.unit.models.tiny import write_config

DIRECTORIES = {
    "empty": ({}, "an empty directory", "config.json"),
    "gguf": ({"m.Q4_K_M.gguf": ""}, "GGUF", "safetensors"),
    "adapter": (
        {"adapter_config.json": '{"base_model_name_or_path": "owner/base"}', "adapter_model.safetensors": ""},
        "LoRA adapter (adapter_config.json) of owner/base",
        "merge_and_unload",
    ),
    "pipeline": ({"model_index.json": '{"_class_name": "FluxPipeline"}'}, "FluxPipeline", "piecework.compile"),
    "broken pipeline": ({"model_index.json": "["}, "a pipeline of diffusers", "piecework.compile"),
    "bundle": ({"manifest.json": "{}", "plan.json": ""}, "a bundle", "--bundle"),
}
FILES = {
    "m.gguf": ("GGUF", "safetensors"),
    "renamed.bin": ("GGUF", "safetensors"),
    "model.safetensors": ("a file", "its directory"),
    "model.pwb": ("a bundle", "--bundle"),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_of_something_else_is_told(name: str, tmp_path: Path) -> None:
    files, found, try_ = DIRECTORIES[name]
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(UnsupportedModelError) as error:
        read_config(tmp_path)
    assert found in error.value.found
    assert try_ in error.value.try_


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_told(name: str, tmp_path: Path) -> None:
    found, try_ = FILES[name]
    write_config(tmp_path, "llama")
    (tmp_path / name).write_bytes(b"GGUF\3\0\0\0" if found == "GGUF" else b"PK")
    with pytest.raises(UnsupportedModelError) as error:
        read_config(tmp_path / name)
    assert found in error.value.found
    assert try_ in error.value.try_


@pytest.mark.parametrize(
    ("files", "found", "try_"),
    [
        (["pytorch_model.bin"], "a pickle", "save_pretrained"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "a pickle", "save_pretrained"),
        (["consolidated.safetensors"], "consolidated.safetensors", "--random-weights"),
        (["m.gguf"], "GGUF", "safetensors"),
        ([], "neither model.safetensors", "--random-weights"),
    ],
)
def test_weights_that_are_not_read_are_told(files: list[str], found: str, try_: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(WeightsError) as error:
        weight_files(tmp_path)
    assert found in error.value.found
    assert try_ in error.value.try_


@pytest.mark.parametrize(("file", "try_"), [("vocab.json", "AutoTokenizer"), ("README.md", "copy")])
def test_weights_without_a_tokenizer_are_told(file: str, try_: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"no tokenizer\.json") as error:
        load_tokenizer(tmp_path)
    assert try_ in error.value.try_


def run_the_command(error: UnsupportedModelError | WeightsError) -> None:
    """Run, in a shell's words, what an error says would help."""
    words = shlex.split(error.try_.partition(": ")[2])
    assert words[0] == "python"
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)


@pytest.mark.slow
def test_the_commands_do_what_they_say(tmp_path: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = tmp_path / "a model's directory"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=300)).half()
    made.config.save_pretrained(model)
    torch.save(made.state_dict(), model / "pytorch_model.bin")
    with pytest.raises(WeightsError) as no_weights:
        weight_files(model)
    run_the_command(no_weights.value)
    assert weight_files(model).paths == (model / "model.safetensors",)
    assert read_config(model).dtype == "float16"

    from tokenizers.pre_tokenizers import ByteLevel

    (model / "vocab.json").write_text(json.dumps({text: n for n, text in enumerate(sorted(ByteLevel.alphabet()))}))
    (model / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UnsupportedModelError) as no_tokenizer:
        load_tokenizer(model)
    run_the_command(no_tokenizer.value)
    tokenizer = load_tokenizer(model)
    assert tokenizer.decode(tokenizer.encode("a text")) == "a text"
