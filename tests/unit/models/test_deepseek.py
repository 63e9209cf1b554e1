"""DeepSeek-V2 and -V3 on latent attention, run eagerly, against transformers, which expands everything."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from piecework.bundle.plan import Recipe
from piecework.bundle.run.constants import make_constants
from piecework.errors import UnsupportedModelError
from piecework.models.adapter import build_causal_lm, call_causal_lm
from piecework.models.checkpoint import open_checkpoint
from piecework.ops.mla.core import Regime
from piecework.spec.config import read_config
from piecework.spec.latent_config import MLA_MODES
from piecework.spec.model_spec import ModelSpec
from tests.choice import one_in, slow_but
from tests.unit.capture.graphs import assert_stamped_equals_traced
from tests.unit.models.batches import Part, error, every_regime, expected, inputs_of, run
from tests.unit.models.tiny import LATENT_FAMILIES, eager_pair, reference_model, write_config

VOCAB = 131


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("family", "mla"), one_in(2, LATENT_FAMILIES, MLA_MODES))
def test_every_regime_in_both_modes(tmp_path: Path, family: str, mla: str) -> None:
    reference, model = eager_pair(tmp_path, family, mla=mla)
    model.make_states({"blocks": 12})
    for step in every_regime():
        assert error(run(model, step), expected(reference, step)) <= 1e-5


@pytest.mark.parametrize(
    ("count", "mla"),
    slow_but(itertools.product([1, 2, 15, 16, 17, 64, 300], MLA_MODES), (17, "opaque"), (64, "exposed")),
)
def test_prompts_of_any_length_at_once_and_in_chunks(tmp_path: Path, count: int, mla: str) -> None:
    reference, model = eager_pair(tmp_path, "deepseek_v3", max_tokens=300, mla=mla)
    model.make_states({"blocks": 42})
    prompt, first, second = tokens(count), list(range(1, 21)), list(range(21, 41))
    whole = [Part(prompt, count, first)]
    wanted = expected(reference, whole)
    assert error(run(model, whole), wanted) <= 1e-5
    found = [run(model, [Part(prompt[: i + 37], min(37, count - i), second)]) for i in range(0, count, 37)]
    assert error(torch.cat(found), wanted) <= 1e-5


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_every_batch_may_be_run_as_mixed_and_writes_the_same(tmp_path: Path, family: str) -> None:
    _, model = eager_pair(tmp_path, family)
    module, request = model.request.module, model.request
    prompt = tokens(20)
    steps = {Regime.PREFILL: [Part(prompt[:19], 19, [2, 1])], Regime.DECODE: [Part(prompt, 1, [2, 1])]}
    found: dict[Regime, list[torch.Tensor]] = {}
    for forced in (None, Regime.MIXED):
        model.make_states({"blocks": 3})
        for regime, step in steps.items():
            with torch.inference_mode():
                found.setdefault(regime, []).append(call_causal_lm(module, inputs_of(step), regime=forced or regime))
        caches = [module.get_buffer(name).clone() for name in request.states]
        found.setdefault(Regime.MIXED, []).append(torch.stack(caches))
    for first, second in found.values():
        assert error(first, second) <= 1e-6


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_the_modes_agree(tmp_path: Path, family: str) -> None:
    pairs = [eager_pair(tmp_path, family, mla=mla)[1] for mla in MLA_MODES]
    prompt, other = tokens(40), tokens(30, 1)
    steps = [[Part(prompt[:39], 39, [1, 2, 3])], [Part(prompt, 1, [1, 2, 3]), Part(other, 30, [4, 5])]]
    for model in pairs:
        model.make_states({"blocks": 6})
    for step in steps:
        exposed, opaque = (run(model, step) for model in pairs)
        assert error(exposed, opaque) <= 1e-5


@pytest.mark.parametrize(("family", "mla"), one_in(2, ["deepseek_v2", "deepseek_v3"], MLA_MODES))
def test_stamped_graphs_equal_traced_ones(tmp_path: Path, family: str, mla: str) -> None:
    model_dir = write_config(tmp_path, family, num_hidden_layers=6, first_k_dense_replace=2)
    request = build_causal_lm(ModelSpec.of(model_dir, max_tokens=64, mla=mla))
    forwards = [request.call, *(variant.call for variant in request.variants)]
    assert len(forwards) == {"exposed": 3, "opaque": 1}[mla]
    for call in forwards:
        assert_stamped_equals_traced(replace(request, call=call, variants=()), traced=2, stamped=4)


def test_a_large_model_takes_no_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256}
    heads = {"num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "v_head_dim": 128}
    changes = {**sizes, **heads, "num_hidden_layers": 61, "vocab_size": 129280}
    module = build_causal_lm(
        ModelSpec.of(write_config(tmp_path, "deepseek_v3", **changes), dtype="bfloat16", max_tokens=64)
    ).module
    tensors = [*module.parameters(), *module.buffers()]
    assert sum(t.numel() for t in module.parameters()) > 6e11
    assert sum(t.nbytes for t in tensors if not t.is_meta) < 1000


def test_the_cache_holds_one_entry_per_token_and_layer(tmp_path: Path) -> None:
    request = build_causal_lm(ModelSpec.of(write_config(tmp_path, "deepseek_v3"), dtype="bfloat16", max_tokens=64))
    assert list(request.states) == [f"model.layers.{i}.self_attn.latent_cache" for i in range(3)]
    assert {(state.shape, state.dtype) for state in request.states.values()} == {(("blocks", 16, 32 + 8), "bfloat16")}


def test_only_frequencies_are_real(tmp_path: Path) -> None:
    request = build_causal_lm(ModelSpec.of(write_config(tmp_path, "deepseek_v3"), dtype="bfloat16", max_tokens=64))
    real = {n: t for n, t in request.module.named_buffers() if not t.is_meta}
    assert list(real) == ["model.rotary_emb.rotary.inv_freq"]
    parameters = dict(request.module.named_parameters())
    assert all(p.is_meta and not p.requires_grad for p in parameters.values())
    single = {n for n, p in parameters.items() if p.dtype == torch.float32}
    routers = [f"model.layers.{i}.mlp.gate" for i in (1, 2)]
    assert single == {f"{r}.{n}" for r in routers for n in ("weight", "e_score_correction_bias")}
    assert all(p.dtype == torch.bfloat16 for n, p in parameters.items() if n not in single)


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_parameters_are_named_as_transformers_names_them(tmp_path: Path, family: str) -> None:
    model_dir = write_config(tmp_path, family)
    names = build_causal_lm(ModelSpec.of(model_dir, max_tokens=64)).module.state_dict().keys()
    assert names == reference_model(model_dir).state_dict().keys()


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_weights_come_from_checkpoints_of_single_experts(tmp_path: Path, family: str) -> None:
    model_dir = write_config(tmp_path, family)
    reference: Any = reference_model(model_dir)
    reference.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert not any("gate_up_proj" in name for name in checkpoint.names())
    request = build_causal_lm(ModelSpec.of(model_dir, max_tokens=64))
    module = request.module
    module.load_state_dict(reference.state_dict(), strict=True, assign=True)
    loaded = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    recipes = [
        Recipe(name, tuple(loaded[name].shape), "float32", source=source) for name, source in request.sources.items()
    ]
    assert len(recipes) == 3 * 2 + 2 * 2
    made = make_constants(recipes, source=checkpoint, literals={}, device="cpu")
    for recipe, tensor in zip(recipes, made, strict=True):
        assert torch.equal(tensor, loaded[recipe.name])


@pytest.mark.parametrize("family", LATENT_FAMILIES)
def test_routers_choose_as_transformers_do(tmp_path: Path, family: str) -> None:
    model_dir = write_config(tmp_path, family)
    reference: nn.Module = reference_model(model_dir)
    module = build_causal_lm(ModelSpec.of(model_dir, max_tokens=64)).module
    module.load_state_dict(reference.state_dict(), assign=True)
    name = "model.layers.1.mlp.gate"
    hidden = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    experts, weights = module.get_submodule(name)(hidden)
    _, their_weights, their_experts = reference.get_submodule(name)(hidden)
    ours, theirs = experts.sort(1), their_experts.sort(1)
    assert torch.equal(ours.values, theirs.values)
    torch.testing.assert_close(weights.gather(1, ours.indices), their_weights.gather(1, theirs.indices))


@pytest.mark.parametrize(
    ("family", "changes", "found"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"hidden_act": "gelu"}, "hidden_act"),
        ("deepseek_v3", {"n_group": 3}, "groups"),
        ("deepseek_v3", {"n_group": 8}, "groups"),
        ("deepseek_v3", {"topk_group": 5}, "groups"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "experts per token"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "wrong value"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "latent attention"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "latent attention"),
    ],
)
def test_what_is_not_implemented_is_refused(tmp_path: Path, family: str, changes: dict[str, Any], found: str) -> None:
    with pytest.raises(UnsupportedModelError, match=found):
        read_config(write_config(tmp_path, family, **changes))


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="exposed, opaque"):
        build_causal_lm(ModelSpec.of(write_config(tmp_path, "deepseek_v3"), max_tokens=64, mla="hidden"))


def test_a_model_of_dense_layers_has_no_experts(tmp_path: Path) -> None:
    reference, model = eager_pair(tmp_path, "deepseek_v2", first_k_dense_replace=3)
    assert read_config(tmp_path).experts is None
    model.make_states({"blocks": 3})
    step = [Part(tokens(20), 20, [1, 2])]
    assert error(run(model, step), expected(reference, step)) <= 1e-5
