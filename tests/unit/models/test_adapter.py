"""The adapter's module, run eagerly on the paged cache, against transformers' own forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from piecework.errors import UnsupportedModelError
from piecework.models.adapter import build_causal_lm
from piecework.spec.model_spec import ModelSpec
from tests.choice import slow_but
from tests.unit.models.batches import Part, error, expected, run
from tests.unit.models.tiny import (
    FAMILIES,
    HYBRID_FAMILIES,
    LATENT_FAMILIES,
    MORE_FAMILIES,
    EagerModel,
    eager_pair,
    reference_model,
    write_config,
)

ALL = (*FAMILIES, *MORE_FAMILIES, *HYBRID_FAMILIES, *LATENT_FAMILIES)


@pytest.mark.parametrize(
    "family", slow_but(ALL, "llama", "mistral", "gemma2", "gpt_oss", "qwen3_next", "bamba", "bloom", "falcon_alibi")
)
def test_logits_equal_transformers_for_prefill_chunks_decode_and_a_mix(tmp_path: Path, family: str) -> None:
    reference, model = eager_pair(tmp_path, family)
    model.make_states({"blocks": 9, "state_slots": 9})
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(3, 131, (40,), generator=generator) for _ in range(2))
    a_blocks, b_blocks = [7, 2, 5], [1, 8, 3]
    steps = [
        [Part(a[:18], 18, a_blocks)],
        [Part(a[:19], 1, a_blocks), Part(b[:20], 20, b_blocks)],
        [Part(a[:20], 1, a_blocks), Part(b[:33], 13, b_blocks)],
        [Part(a[:21], 1, a_blocks), Part(b[:34], 1, b_blocks)],
        [Part(b[:35], 1, b_blocks)],
    ]
    for step in steps:
        assert error(run(model, step), expected(reference, step)) <= 1e-5


@pytest.mark.parametrize("family", slow_but(ALL, "qwen2", "deepseek_v3"))
def test_bfloat16_is_as_close_to_float32_as_transformers_bfloat16(tmp_path: Path, family: str) -> None:
    model_dir = write_config(tmp_path, family)
    step = [Part(torch.arange(3, 43), 40, [1, 3, 2])]
    ours = theirs = 0.0
    routed = "num_experts_per_tok" in MORE_FAMILIES.get(family, {})  # rounding sends some tokens to other experts
    for seed in range(6 if routed else 1):
        exact = reference_model(model_dir, seed=seed)
        rounded = reference_model(model_dir, seed=seed).to(torch.bfloat16)
        request = build_causal_lm(ModelSpec.of(model_dir, dtype="bfloat16", max_tokens=64))
        model = EagerModel(request, rounded.state_dict())
        model.make_states({"blocks": 4, "state_slots": 4})
        wanted = expected(exact, step)
        ours += float((run(model, step).float() - wanted).abs().mean())
        theirs += float((expected(rounded, step).float() - wanted).abs().mean())
    assert ours <= (1.5 if routed else 1.25) * theirs


def test_only_buffers_are_real(tmp_path: Path) -> None:
    request = build_causal_lm(ModelSpec.of(write_config(tmp_path, "llama"), dtype="bfloat16", max_tokens=64))
    assert all(p.is_meta and p.dtype == torch.bfloat16 and not p.requires_grad for p in request.module.parameters())
    buffers = {n: b for n, b in request.module.named_buffers() if n not in request.states}
    assert "model.rotary_emb.inv_freq" in buffers
    assert all(b.device.type == "cpu" and b.dtype == torch.float32 for b in buffers.values())
    assert not request.module.training


def test_the_request_declares_one_cache_per_layer(tmp_path: Path) -> None:
    request = build_causal_lm(ModelSpec.of(write_config(tmp_path, "qwen3"), max_tokens=77))
    assert list(request.states) == [f"model.layers.{i}.self_attn.kv_cache" for i in range(3)]
    assert request.states["model.layers.0.self_attn.kv_cache"].shape == (2, "blocks", 16, 2, 32)
    assert next(iter(request.sizes)) == "tokens"
    assert (request.sizes["tokens"].min, request.sizes["tokens"].max) == (1, 77)


@pytest.mark.parametrize(("tied", "num_parameters"), [(True, 29), (False, 30)])
def test_tied_weights_are_one_parameter(tmp_path: Path, tied: bool, num_parameters: int) -> None:
    model_dir = write_config(tmp_path, "llama", tie_word_embeddings=tied)
    module = build_causal_lm(ModelSpec.of(model_dir, max_tokens=64)).module
    assert (module.lm_head.weight is module.model.embed_tokens.weight) is tied
    assert len(list(module.parameters())) == num_parameters


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 32,  # of 40 tokens, so that transformers takes the long factors too
        },
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_rope_types_equal_transformers(tmp_path: Path, scaling: dict[str, object]) -> None:
    reference, model = eager_pair(tmp_path, "llama", rope_scaling=scaling)
    model.make_states({"blocks": 4})
    step = [Part(torch.arange(3, 43), 40, [1, 3, 2])]
    assert error(run(model, step), expected(reference, step)) <= 1e-5


def test_an_architecture_that_is_not_what_transformers_builds_is_refused(tmp_path: Path) -> None:
    model_dir = write_config(tmp_path, "llama", architectures=["OtherForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="OtherForCausalLM"):
        build_causal_lm(ModelSpec.of(model_dir, max_tokens=64))


def test_a_mixer_without_an_operator_is_refused_with_the_place_of_its_code(tmp_path: Path) -> None:
    model_dir = write_config(tmp_path, "llama", model_type="kimi_linear", architectures=["KimiLinearForCausalLM"])
    place = r"KimiLinearDeltaAttention \(.*modeling_kimi_linear.py:\d+\)"
    with pytest.raises(UnsupportedModelError, match=f"{place} keeps a recurrent"):
        build_causal_lm(ModelSpec.of(model_dir, max_tokens=64))


def test_states_have_a_slot_for_each_sequence(tmp_path: Path) -> None:
    request = build_causal_lm(ModelSpec.of(write_config(tmp_path, "bamba"), dtype="bfloat16", max_tokens=64))
    shapes = {name.removeprefix("model.layers."): (state.shape, state.dtype) for name, state in request.states.items()}
    assert shapes == {
        "0.mamba.conv_state": (("state_slots", 128 + 2 * 2 * 12, 3), "bfloat16"),
        "0.mamba.recurrent_state": (("state_slots", 8, 16, 12), "float32"),
        "1.self_attn.kv_cache": ((2, "blocks", 16, 2, 16), "bfloat16"),
        "2.mamba.conv_state": (("state_slots", 128 + 2 * 2 * 12, 3), "bfloat16"),
        "2.mamba.recurrent_state": (("state_slots", 8, 16, 12), "float32"),
    }
    assert "state_slots" in request.sizes
    assert "state_slots" in {given.name for given in request.inputs}


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="int3"):
        build_causal_lm(ModelSpec.of(write_config(tmp_path, "llama"), dtype="int3", max_tokens=64))
