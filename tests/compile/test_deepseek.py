"""DeepSeek-V2 and -V3 from checkpoint to tokens: bundles of both modes, in every regime, against transformers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from piecework.bundle.bundle import Bundle, BundleContent, open_bundle, write_bundle
from piecework.bundle.plan import OpStep
from piecework.bundle.run import LoadedModel, load
from piecework.bundle.store.directory import DirectoryStore
from piecework.cli.main import main
from piecework.compiler.model import CompiledModel, compile_model
from piecework.engine.llm import LLM
from piecework.engine.sampling_params import SamplingParams
from piecework.errors import WeightsError
from piecework.foundation.environment import Environment
from piecework.spec.compile_options import BackendName
from piecework.spec.latent_config import MLA_MODES
from piecework.spec.model_spec import ModelSpec
from tests.choice import one_in, slow_but
from tests.unit.engine.test_engine_models import NUM_TOKENS, assert_greedy, mixed_prompts, transformers_tokens
from tests.unit.models.batches import Part, error, every_regime, expected, run
from tests.unit.models.tiny import LATENT_FAMILIES, reference_model, write_config

Compile = Callable[..., CompiledModel]
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
BLOCK_BYTES = 3 * 16 * (32 + 8) * 4
PIECES = {"exposed": 12, "opaque": 5}


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, nn.Module]]:
    """A directory with its weights, as transformers saves them, and the model in it, by family."""
    made: dict[str, tuple[Path, nn.Module]] = {}

    def get(family: str) -> tuple[Path, nn.Module]:
        if family not in made:
            model_dir = write_config(tmp_path_factory.mktemp(family), family, eos_token_id=None)
            reference: Any = reference_model(model_dir)
            config = (model_dir / "config.json").read_text()
            reference.save_pretrained(model_dir)
            (model_dir / "config.json").write_text(config)
            made[family] = model_dir, reference
        return made[family]

    return get


@pytest.fixture(scope="session")
def compile_family(home: Path, references: Callable[[str], tuple[Path, nn.Module]]) -> Compile:
    def make(
        family: str | Path, *, backend: BackendName = BackendName.EAGER, max_tokens: int = 64, **given: Any
    ) -> CompiledModel:
        options = {"dtype": "float32", "backend": backend, "max_tokens": max_tokens, **given}
        return compile_model(
            ModelSpec.of(references(family)[0] if isinstance(family, str) else family, **options),
            store=DirectoryStore(home),
            environment=Environment(store_root=home),
        )

    return make


def without_variants(bundle: Bundle, out: Path) -> Bundle:
    """Write the bundle without forwards for one kind of batches: the one for mixed ones runs them all."""
    constants = bundle.path / "constants.safetensors"
    content = BundleContent(
        plan={**bundle.plan(), "variants": []},
        artifacts={name: bundle.artifact_path(name) for name in bundle.artifacts},
        facts=bundle.facts,
        record=bundle.record(),
        constants=constants.read_bytes() if constants.exists() else None,
    )
    return write_bundle(out, content)


def caches_and_logits(model: LoadedModel, steps: list[list[Part]]) -> list[Tensor]:
    """Return, for each step, the logits and the caches of all layers after it."""
    model.make_states({"blocks": 12})
    found = []
    for step in steps:
        found += [run(model, step), torch.stack(list(model.states.values()))]
    return found


@pytest.mark.parametrize(("family", "mla"), one_in(4, LATENT_FAMILIES, MLA_MODES))
def test_every_regime_equals_transformers(family: str, mla: str, compile_family: Compile, references: Any) -> None:
    model_dir, reference = references(family)
    compiled = compile_family(family, mla=mla)
    assert compiled.bundle.record().counts["unique_pieces"] == PIECES[mla]
    model = load(compiled.bundle, weights=model_dir / "model.safetensors")
    model.make_states({"blocks": 12})
    for step in every_regime():
        assert error(run(model, step), expected(reference, step)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mla"),
    slow_but(
        [*((f, "exposed") for f in LATENT_FAMILIES), ("deepseek_v3", "opaque")], ("deepseek_v3_halves", "exposed")
    ),
)
def test_64_tokens_with_preemptions_and_prefix_hits(
    family: str, mla: str, compile_family: Compile, references: Any
) -> None:
    model_dir, reference = references(family)
    bundle = compile_family(family, mla=mla).bundle.path
    prompts = mixed_prompts(24)
    with LLM(model_dir, bundle=bundle, kv_cache_memory=30 * BLOCK_BYTES, max_seqs=12) as llm:
        found = llm.generate(prompts, PARAMS)
        stats = llm.stats()
    for prompt, completion in zip(prompts, found, strict=True):
        assert_greedy(reference, prompt, list(completion.tokens))
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    assert list(found[3].tokens) == transformers_tokens(reference, prompts[3])


@pytest.mark.slow
@pytest.mark.parametrize("mla", slow_but(MLA_MODES, "exposed"))
def test_prompts_of_1_to_300_tokens_in_chunks(mla: str, compile_family: Compile, references: Any) -> None:
    model_dir, reference = references("deepseek_v2_groups")
    model = load(
        compile_family("deepseek_v2_groups", mla=mla, max_tokens=300).bundle, weights=model_dir / "model.safetensors"
    )
    model.make_states({"blocks": 40})
    prompt = torch.randint(3, 131, (300,), generator=torch.Generator().manual_seed(5))
    wanted = expected(reference, [Part(prompt, 300, [])])
    for count in (1, 2, 17, 300):
        assert error(run(model, [Part(prompt[:count], count, list(range(1, 20)))]), wanted[:count]) <= 1e-5
    ends = [1, 2, 19, 20, 147, 148, 300]
    for begin, end in zip([0, *ends], ends, strict=False):
        part = Part(prompt[:end], end - begin, list(range(39, 20, -1)))
        assert error(run(model, [part]), wanted[begin:end]) <= 1e-5


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_the_mixed_forward_is_right_for_every_batch(
    family: str, compile_family: Compile, references: Any, tmp_path: Path
) -> None:
    """It has no decode tokens, or no prefill tokens, where a batch has none."""
    bundle, weights = compile_family(family).bundle, references(family)[0] / "model.safetensors"
    model = load(bundle, weights=weights)
    assert [variant.name for variant in model.plan.variants] == ["decode", "prefill"]
    by_regime = caches_and_logits(model, every_regime())
    mixed = load(without_variants(bundle, tmp_path / "mixed"), weights=weights)
    for found, wanted in zip(caches_and_logits(mixed, every_regime()), by_regime, strict=True):
        assert error(found, wanted) <= 1e-6


def test_a_batch_of_one_kind_takes_one_path(compile_family: Compile, references: Any) -> None:
    model = load(compile_family("deepseek_v3").bundle, weights=references("deepseek_v3")[0] / "model.safetensors")
    plan = model.plan
    steps = {v.name: [s.op for s in v.steps if isinstance(s, OpStep)] for v in plan.variants}
    steps["mixed"] = [s.op for s in plan.steps if isinstance(s, OpStep)]
    layer = {
        "decode": ["mla_write_decode"],
        "prefill": ["mla_write", "mla_prefill"],
        "mixed": ["mla_write", "rows", "mla_decode", "rows", "mla_prefill"],
    }
    for name, ops in layer.items():
        wanted = [*ops, *ops, "moe_experts", *ops, "moe_experts"]
        assert steps[name] == [f"piecework::{op}.default" for op in wanted]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mla"),
    slow_but(
        itertools.product(LATENT_FAMILIES, MLA_MODES), ("deepseek_v3_halves", "exposed"), ("deepseek_v2", "opaque")
    ),
)
def test_caches_hold_the_same_after_every_pass(family: str, mla: str, compile_family: Compile, references: Any) -> None:
    weights = references(family)[0] / "model.safetensors"
    plain, merged = (
        load(compile_family(family, mla=mla, passes_off=off).bundle, weights=weights) for off in (["merge_linear"], ())
    )
    steps = every_regime()
    for found, wanted in zip(caches_and_logits(merged, steps), caches_and_logits(plain, steps), strict=True):
        assert error(found, wanted) <= 1e-6
        assert wanted.any()


def test_queries_and_latents_are_one_product_in_every_regime(compile_family: Compile) -> None:
    """In mixed batches too, where another piece reads rows of the queries, whatever their strides."""
    bundle = compile_family("deepseek_v2").bundle
    explained = json.loads((bundle.path / "explain.json").read_text())
    reports = [report for passes in explained["passes"] for report in passes if report["name"] == "merge_linear"]
    told = [text for report in reports for text in (*report["matches"], *report["near_misses"])]
    queries = {text.partition(",")[0] for text in told if "96 + 40 outputs" in text}
    assert queries == {"merged 2 linear layers of 96 + 40 outputs"}


@pytest.mark.parametrize("layers", slow_but([6, 14], 6))
def test_pieces_do_not_grow_with_depth(layers: int, compile_family: Compile, tmp_path: Path) -> None:
    model_dir = write_config(tmp_path, "deepseek_v3", num_hidden_layers=layers, first_k_dense_replace=3)
    tensors: Any = reference_model(model_dir)
    tensors.save_pretrained(model_dir)
    counts = compile_family(model_dir).bundle.record().counts
    assert counts["unique_pieces"] == PIECES["exposed"]


def test_stacked_experts_and_layers_of_token_prediction(
    compile_family: Compile, references: Any, tmp_path: Path
) -> None:
    model_dir, reference = references("deepseek_v3")
    single = load_file(model_dir / "model.safetensors")
    assert sum("experts.7.gate_proj" in name for name in single) == 2
    stacked = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
    assert not any("experts.7" in name for name in stacked)
    stacked |= {f"model.layers.3.{name}": torch.ones(3) for name in ("eh_proj.weight", "self_attn.kv_b_proj.weight")}
    other = tmp_path / "stacked"
    other.mkdir()
    (other / "config.json").write_text((model_dir / "config.json").read_text())
    save_file(stacked, other / "model.safetensors")
    bundle = compile_family(other).bundle  # which looks for all tensors
    step = [Part(torch.arange(3, 33), 30, [1, 2])]
    found = []
    for place in (model_dir, other):
        model = load(bundle, weights=place / "model.safetensors")
        model.make_states({"blocks": 3})
        found.append(run(model, step))
    assert torch.equal(*found)


@pytest.fixture(scope="session")
def wide_values(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A model whose up-projection of values and output projection take less work as one weight."""
    model_dir = write_config(tmp_path_factory.mktemp("wide"), "deepseek_v3_halves", eos_token_id=None, v_head_dim=32)
    reference: Any = reference_model(model_dir)
    config = (model_dir / "config.json").read_text()
    reference.save_pretrained(model_dir)
    (model_dir / "config.json").write_text(config)
    return model_dir, reference


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", [BackendName.AOTI])
def test_values_and_output_are_projected_as_one(
    backend: BackendName, compile_family: Compile, wide_values: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    model_dir, reference = wide_values
    bundle = compile_family(model_dir, backend=backend).bundle
    counted = "are one weight: 0.0164 MFLOP per token and layer; apart it were 0.0246 MFLOP"
    assert [note for note in bundle.record().notes if counted in note]
    weights = model_dir / "model.safetensors"
    model = load(bundle, weights=weights)
    folded = [recipe.name for recipe in model.plan.recipes if "o_proj.weight * kv_b_proj.weight" in recipe.name]
    assert len(folded) == 3
    found = caches_and_logits(model, every_regime())
    model.make_states({"blocks": 12})
    for step in every_regime():
        assert error(run(model, step), expected(reference, step)) <= 1e-4
    mixed = load(without_variants(bundle, tmp_path / "mixed"), weights=weights)  # where they are two
    for one, two in zip(found, caches_and_logits(mixed, every_regime()), strict=True):
        assert error(one, two) <= 1e-5
    if backend is BackendName.EAGER:
        prompts = mixed_prompts(8)
        with LLM(model_dir, bundle=bundle.path, kv_cache_memory=60 * BLOCK_BYTES) as llm:
            for prompt, completion in zip(prompts, llm.generate(prompts, PARAMS), strict=True):
                assert_greedy(reference, prompt, list(completion.tokens))


def test_the_decision_is_told_where_they_are_two(
    compile_family: Compile, references: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = compile_family("deepseek_v3").bundle
    assert main(["inspect", str(bundle.path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "stay apart: 0.00922 MFLOP per token and layer; as one weight it were 0.0164 MFLOP" in said
    assert not [note for note in compile_family("deepseek_v3", mla="opaque").bundle.record().notes if "MFLOP" in note]


@pytest.mark.parametrize("mla", slow_but(MLA_MODES))
def test_the_command_compiles_either_way(
    mla: str, references: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir, _ = references("deepseek_v3")
    options = ["--mla", mla, "--backend", "eager", "--max-tokens", "16", "--out", str(tmp_path / "bundle"), "--json"]
    assert main(["compile", str(model_dir), *options]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["mla"], figures["unique_pieces"]) == (mla, PIECES[mla])
    assert ["option", "mla", mla] in [[f.kind, f.name, f.value] for f in open_bundle(tmp_path / "bundle").facts]


def test_a_checkpoint_without_an_expert_is_refused(compile_family: Compile, references: Any, tmp_path: Path) -> None:
    model_dir, _ = references("deepseek_v3")
    tensors = load_file(model_dir / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"experts\.5\.up_proj"):
        compile_family(tmp_path, max_tokens=65)  # which no other test has compiled


@pytest.mark.parametrize(
    ("family", "mla"),
    slow_but([("deepseek_v3", "exposed"), ("deepseek_v2", "opaque")]),
)
def test_native_code_equals_transformers(family: str, mla: str, compile_family: Compile, references: Any) -> None:
    model_dir, reference = references(family)
    bundle = compile_family(family, mla=mla, backend=BackendName.AOTI).bundle
    model = load(bundle, weights=model_dir / "model.safetensors")
    model.make_states({"blocks": 12})
    for step in every_regime():
        assert error(run(model, step), expected(reference, step)) <= 1e-4
    prompts = mixed_prompts(12)
    notes: list[str] = []
    with LLM(model_dir, mla=mla, max_tokens=64, kv_cache_memory=60 * BLOCK_BYTES, on_note=notes.append) as llm:
        assert llm.bundle.path == bundle.path
        for prompt, completion in zip(prompts, llm.generate(prompts, PARAMS), strict=True):
            assert_greedy(reference, prompt, list(completion.tokens))
    assert notes == []
