"""Unmodified models of transformers through `piecework.compile`: lengths from 1, and no more pieces for more layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, CLIPTextModel, CLIPVisionModel, T5EncoderModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import piecework
from piecework.capture.request import Dim
from piecework.spec.compile_options import BackendName, CompileOptions
from tests.choice import slow_but

EAGER = CompileOptions(backend=BackendName.EAGER)
TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
BERT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
GPT2 = {"n_embd": 64, "n_head": 4, "n_positions": 128}
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

KEPT = ("gpt2", "mixtral", "bert", "t5")
"""Those that run with several depths, three of them each time; the others have as many unique pieces with 4 layers."""


@dataclass(frozen=True)
class Family:
    """How a small model of a family is made.

    Attributes:
        config: fields beside the number of layers.
        layers: the name of that field.
        make: the model of a config.
        unique: unique pieces, however many layers.
    """

    config: dict[str, Any] = field(default_factory=dict)
    layers: str = "num_hidden_layers"
    make: Callable[[Any], nn.Module] = AutoModelForCausalLM.from_config
    unique: int = 3


CAUSAL = {  # those that the engine takes have the like in test_families.py
    "gemma": Family(LLAMA),
    "gemma3_text": Family(LLAMA),
    "phi": Family(LLAMA),
    "stablelm": Family(LLAMA),
    "cohere": Family(LLAMA),
    "opt": Family({"hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64}),
    "gpt2": Family(GPT2, layers="n_layer"),
    "gptj": Family({**GPT2, "rotary_dim": 8}, layers="n_layer"),
    "mixtral": Family({**LLAMA, **FOUR}, unique=5),
    "qwen2_moe": Family({**LLAMA, **EXPERTS, "shared_expert_intermediate_size": 32}, unique=5),
    "olmoe": Family({**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}, unique=5),
}
ENCODERS = {
    "bert": Family(BERT, make=AutoModel.from_config),
    "roberta": Family(BERT, make=AutoModel.from_config),
    "camembert": Family(BERT, make=AutoModel.from_config),
    "electra": Family(BERT, make=AutoModel.from_config),
    "distilbert": Family({"dim": 64, "n_heads": 4, "hidden_dim": 96}, layers="n_layers", make=AutoModel.from_config),
    "albert": Family({**BERT, "embedding_size": 32}, make=AutoModel.from_config),
    "clip_text_model": Family(BERT, make=CLIPTextModel),
    "t5": Family({"d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4}, layers="num_layers", make=T5EncoderModel),
}


def make(kind: str, family: Family, layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**TOKENS, **family.config, family.layers: layers})
    return family.make(config).eval().float()


def tokens(length: int) -> Tensor:
    return torch.randint(3, 100, (1, length))


def check(kind: str, family: Family, tmp_path: Path, kwargs: dict[str, Any], *, depths: tuple[int, ...]) -> None:
    """Compile with so many layers, and compare at the ends of the range and inside."""
    for layers in depths:
        module = make(kind, family, layers)
        dynamic = {"length": Dim(1, 64, axes={"input_ids": 1})}
        out = tmp_path / str(layers)
        bundle = piecework.compile(module, (tokens(33),), kwargs, dynamic=dynamic, options=EAGER, out=out)
        counts = bundle.record().counts
        assert counts["unique_pieces"] == family.unique
        assert counts["blocks_stamped"] + counts["blocks_traced"] >= layers or kind == "albert"
        model = piecework.load(bundle, weights=module)
        for length in (1, 2, 7, 64):
            ids = tokens(length)
            with torch.no_grad():
                torch.testing.assert_close(model(ids, **kwargs)[0], module(ids, **kwargs)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", slow_but(CAUSAL, KEPT[0]))
def test_language_models(kind: str, tmp_path: Path) -> None:
    check(kind, CAUSAL[kind], tmp_path, {"use_cache": False}, depths=(2, 4) if kind in KEPT else (4,))


@pytest.mark.parametrize("kind", slow_but(ENCODERS, *KEPT[2:]))
def test_encoders(kind: str, tmp_path: Path) -> None:
    check(kind, ENCODERS[kind], tmp_path, {}, depths=(2, 4) if kind in KEPT else (4,))


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "unique"), [(2, 6), (4, 7), (7, 7)])
def test_modernbert_beyond_its_window(layers: int, unique: int, tmp_path: Path) -> None:
    """Its local layers need no mask where the text is shorter than half their window, 64 here."""
    module = make(
        "modernbert", Family({**BERT, "cls_token_id": 1, "sep_token_id": 2}, make=AutoModel.from_config), layers
    )
    dynamic = {"length": Dim(1, 160, axes={"input_ids": 1})}
    out = tmp_path / "b"
    bundle = piecework.compile(module, (tokens(33),), dynamic=dynamic, options=EAGER, out=out)
    model = piecework.load(bundle, weights=module)
    assert [variant.name for variant in model.plan.variants] == ["length from 1 to 63"]
    assert bundle.record().counts["unique_pieces"] == unique
    for length in (1, 63, 64, 65, 160):
        ids = tokens(length)
        with torch.no_grad():
            torch.testing.assert_close(model(ids)[0], module(ids)[0], atol=1e-5, rtol=1e-5)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32)


def sounds(count: int) -> Tensor:
    return torch.randn(count, 16, 40)


OTHERS: dict[str, tuple[str, dict[str, Any], Callable[[Any], nn.Module], Callable[[int], Tensor]]] = {
    "vit": ("vit", {**BERT, "image_size": 32, "patch_size": 8}, AutoModel.from_config, images),
    "clip vision": ("clip_vision_model", {**BERT, "image_size": 32, "patch_size": 8}, CLIPVisionModel, images),
    "whisper's encoder": (
        "whisper",
        {
            "d_model": 64,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "decoder_start_token_id": 1,
        },
        WhisperEncoder,
        sounds,
    ),
}


@pytest.mark.parametrize("name", slow_but(OTHERS, "vit"))
def test_a_dynamic_batch(name: str, tmp_path: Path) -> None:
    kind, fields, cls, example = OTHERS[name]
    layers = "encoder_layers" if kind == "whisper" else "num_hidden_layers"
    extra = TOKENS if kind == "whisper" else {}
    found = set()
    for depth in (2, 4):
        module = cls(CONFIG_MAPPING[kind](**{**extra, **fields, layers: depth})).eval()
        out = tmp_path / str(depth)
        bundle = piecework.compile(module, (example(3),), dynamic={"batch": Dim(1, 8)}, options=EAGER, out=out)
        found.add(bundle.record().counts["unique_pieces"])
        model = piecework.load(bundle, weights=module)
        for count in (1, 2, 8):
            x = example(count)
            with torch.no_grad():
                torch.testing.assert_close(model(x)[0], module(x)[0], atol=1e-5, rtol=1e-5)
    assert found == {3}
