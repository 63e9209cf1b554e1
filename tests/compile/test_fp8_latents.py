"""Caches of latents in fp8, from the option to tokens: bundles of both modes in every regime, in chunks, preempted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piecework.bundle.bundle import Bundle
from piecework.bundle.plan import Plan
from piecework.bundle.run import LoadedModel, load
from piecework.bundle.store.directory import DirectoryStore
from piecework.cli.main import main
from piecework.compiler.model import CompiledModel, compile_model
from piecework.engine.kv_memory import memory_needs
from piecework.engine.llm import LLM
from piecework.engine.sampling_params import SamplingParams
from piecework.errors import StaleBundle, UnsupportedModelError
from piecework.foundation.environment import Environment
from piecework.ops.mla import cache as mla_cache
from piecework.spec.compile_options import BackendName
from piecework.spec.config import read_config
from piecework.spec.latent_config import MLA_MODES
from piecework.spec.model_spec import ModelSpec
from tests.choice import slow_but
from tests.unit.engine.test_engine_models import mixed_prompts
from tests.unit.models.batches import Part, error, every_regime, expected, run
from tests.unit.models.tiny import reference_model, write_config

LAYERS, RANK, ROPE = 3, 32, 8
TOKEN_BYTES = LAYERS * (RANK + 4 + ROPE * 4)
Made = Callable[..., tuple[Path, Bundle]]
Load = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def made(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a model's directory and a bundle of it."""
    directories: dict[str, Path] = {}

    def make(
        family: str, *, kv_cache_dtype: str = "fp8", mla: str = "exposed", backend: BackendName = BackendName.EAGER
    ) -> tuple[Path, Bundle]:
        if family not in directories:
            changes = {"first_k_dense_replace": LAYERS, "initializer_range": 0.02} if family == "dense" else {}
            name = "deepseek_v2" if family == "dense" else family
            directories[family] = write_config(tmp_path_factory.mktemp(family), name, eos_token_id=None, **changes)
            config = (directories[family] / "config.json").read_text()
            model: Any = reference_model(directories[family])
            model.save_pretrained(directories[family])
            (directories[family] / "config.json").write_text(config)
        compiled: CompiledModel = compile_model(
            ModelSpec.of(
                directories[family],
                dtype="float32",
                max_tokens=64,
                backend=backend,
                mla=mla,
                kv_cache_dtype=kv_cache_dtype,
            ),
            store=DirectoryStore(home),
            environment=Environment(store_root=home),
            check_weights=False,
        )
        return directories[family], compiled.bundle

    return make


@pytest.fixture(scope="session")
def model(made: Made) -> Load:
    def get(family: str, **options: Any) -> LoadedModel:
        model_dir, bundle = made(family, **options)
        loaded = load(bundle, weights=model_dir / "model.safetensors")
        loaded.make_states({"blocks": 12})
        return loaded

    return get


def quantized(family_dir: Path) -> nn.Module:
    """Return transformers' model, whose normed latents become what a cache in fp8 has of them."""
    reference: Any = reference_model(family_dir)

    def rounded(_module: object, _given: object, latents: Tensor) -> Tensor:
        rows = latents.flatten(0, -2)
        return mla_cache.decode(mla_cache.encode(rows, RANK), rank=RANK, rope=0, dtype=rows.dtype).view(latents.shape)

    for layer in reference.model.layers:
        layer.self_attn.kv_a_layernorm.register_forward_hook(rounded)
    return reference  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("family", "mla"), slow_but([("deepseek_v2", "exposed"), ("deepseek_v3", "opaque")], ("deepseek_v2", "exposed"))
)
def test_every_regime_equals_transformers_with_rounded_latents(family: str, mla: str, made: Made, model: Load) -> None:
    found, reference = model(family, mla=mla), quantized(made(family)[0])
    for state in found.states.values():
        assert (state.dtype, state.shape) == (torch.uint8, (12, 16, TOKEN_BYTES // LAYERS))
    for step in every_regime():
        assert error(run(found, step), expected(reference, step)) <= 1e-4


@pytest.mark.parametrize("mla", MLA_MODES)
def test_chunks_do_not_change_what_comes_out(mla: str, model: Load) -> None:
    """Prompts' new tokens attend what the cache has of each other."""
    found, exact = (model("deepseek_v3", mla=mla, kv_cache_dtype=kind) for kind in ("fp8", "auto"))
    prompt = torch.randint(3, 131, (40,), generator=torch.Generator().manual_seed(5))
    whole = run(found, [Part(prompt, 40, [1, 2, 3])])
    ends = [1, 2, 19, 20, 36, 37, 38, 39, 40]
    chunks = [run(found, [Part(prompt[:e], e - b, [4, 5, 6])]) for b, e in zip([0, *ends], ends, strict=False)]
    assert error(torch.cat(chunks), whole) <= 1e-4
    assert error(run(exact, [Part(prompt, 40, [1, 2, 3])]), whole) > 1e-3


@pytest.mark.slow
def test_logits_are_near_those_of_an_exact_cache(made: Made, model: Load) -> None:
    """Where no expert is chosen by them, and weights are as large as those of real models."""
    exact, found = (model("dense", kv_cache_dtype=kind) for kind in ("auto", "fp8"))
    for step in every_regime():
        assert 1e-4 < error(run(found, step), run(exact, step)) <= 0.05


def test_tokens_are_those_of_the_other_form_whatever_the_pressure(made: Made) -> None:
    prompts, tokens = mixed_prompts(8), []
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    for mla, blocks in zip(MLA_MODES, (8, 100), strict=True):
        model_dir, bundle = made("deepseek_v3", mla=mla)
        with LLM(model_dir, bundle=bundle.path, kv_cache_memory=blocks * 16 * TOKEN_BYTES, max_seqs=8) as llm:
            tokens.append([c.tokens for c in llm.generate(prompts, params)])
            stats = llm.stats()
        assert stats.kv_blocks_total == blocks
        assert (stats.preemptions > 0) == (blocks == 8)
        assert stats.prefix_hit_tokens > 0
    assert tokens[0] == tokens[1]


def test_memory_is_counted_in_bytes_of_fp8(made: Made) -> None:
    needs = []
    for kind in ("auto", "fp8"):
        model_dir, bundle = made("deepseek_v3", kv_cache_dtype=kind)
        needs.append(memory_needs(Plan.from_json(bundle.plan()), read_config(model_dir), max_seqs=8))
    auto, fp8 = needs
    assert (auto.block, fp8.block) == (16 * LAYERS * (RANK + ROPE) * 4, 16 * TOKEN_BYTES)
    assert (auto.weights, auto.activations) == (fp8.weights, fp8.activations)


def test_a_bundle_is_for_one_kind_of_cache(made: Made) -> None:
    (model_dir, auto), (_, fp8) = (made("deepseek_v3", kv_cache_dtype=kind) for kind in ("auto", "fp8"))
    assert auto.path != fp8.path
    assert fp8.identity["kv_cache_dtype"] == "fp8"
    with pytest.raises(StaleBundle, match="kv_cache_dtype: bundle auto, here fp8"):
        LLM(model_dir, bundle=auto.path, kv_cache_dtype="fp8")
    with LLM(model_dir, bundle=fp8.path, kv_cache_memory=1 << 20) as llm:
        assert llm.bundle.path == fp8.path


@pytest.mark.parametrize("command", ["compile", "serve"])
def test_a_model_without_latents_has_no_such_cache(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir = write_config(tmp_path, "llama")
    assert main([command, str(model_dir), "--kv-cache-dtype", "fp8"]) == 1
    said = capsys.readouterr().err
    assert "with a KV cache of 'fp8'" in said
    assert "a model without latent attention" in said
    with pytest.raises(UnsupportedModelError, match="one of auto, fp8"):
        ModelSpec.of(model_dir, kv_cache_dtype="int4")


@pytest.mark.slow
def test_native_code(made: Made, model: Load) -> None:
    native = model("deepseek_v2", backend=BackendName.AOTI)
    reference = quantized(made("deepseek_v2")[0])
    for step in every_regime():
        assert error(run(native, step), expected(reference, step)) <= 1e-3
