"""`LLM` on bundles: greedy tokens are transformers', alone and in a mixed batch; one model takes over from another."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from piecework.bundle.run import load
from piecework.bundle.store.directory import DirectoryStore
from piecework.compiler.model import CompiledModel, compile_model
from piecework.engine.async_engine import AsyncEngine
from piecework.engine.engine import EngineConfig, engine_for
from piecework.engine.llm import LLM
from piecework.engine.request import GenerationRequest
from piecework.engine.sampling_params import SamplingParams
from piecework.errors import WeightsError
from piecework.foundation.environment import Environment
from piecework.spec.config import read_config
from piecework.spec.model_spec import ModelSpec
from tests.choice import slow_but
from tests.unit.engine.test_engine_models import NUM_TOKENS, assert_greedy, mixed_prompts, transformers_tokens
from tests.unit.models.tiny import write_config

PARAMS = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
BLOCK_BYTES = 3 * 2 * 16 * 2 * 16 * 4


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory: pytest.TempPathFactory, reference: nn.Module) -> Path:
    """The model's directory, with its weights."""
    directory = write_config(tmp_path_factory.mktemp("llama_with_weights"), "llama")
    tensors = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="session")
def eager(home: Path, weights_dir: Path) -> CompiledModel:
    """A bundle of the eager backend, for at most 32 tokens in a forward."""
    return compile_model(
        ModelSpec.of(weights_dir, dtype="float32", max_tokens=32, backend="eager"),
        store=DirectoryStore(home),
        environment=Environment(store_root=home),
        check_weights=False,
    )


@pytest.mark.parametrize("count", slow_but([14, 40], 14))
def test_many_requests_with_preemptions(
    count: int, eager: CompiledModel, weights_dir: Path, reference: nn.Module
) -> None:
    prompts = mixed_prompts(count)
    with LLM(weights_dir, bundle=eager.bundle.path, kv_cache_memory=30 * BLOCK_BYTES, max_seqs=12) as llm:
        found = llm.generate(prompts, PARAMS)
        stats = llm.stats()
    for prompt, completion in zip(prompts, found, strict=True):
        assert_greedy(reference, prompt, list(completion.tokens))
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0
    with LLM(weights_dir, bundle=eager.bundle.path, kv_cache_memory=10 * BLOCK_BYTES) as llm:
        assert list(llm.generate(prompts[3:4], PARAMS)[0].tokens) == transformers_tokens(reference, prompts[3])


@pytest.fixture
def wrong_weights_dir(tmp_path: Path) -> Path:
    """A directory of the same model, of whose weights one has another shape, and the others are missing."""
    directory = write_config(tmp_path / "wrong", "llama")
    save_file({"model.norm.weight": torch.zeros(3)}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("hit", [True, False])
def test_wrong_weights_cost_no_compile(
    hit: bool, eager: CompiledModel, home: Path, wrong_weights_dir: Path, tmp_path: Path
) -> None:
    root = home if hit else tmp_path / "empty"
    store, environment = DirectoryStore(root), Environment(store_root=root)
    spec = ModelSpec.of(wrong_weights_dir, dtype="float32", max_tokens=32, backend="eager")
    before = store.items()
    with pytest.raises(WeightsError, match=r"no such tensor in model\.safetensors, nor"):
        compile_model(spec, store=store, environment=environment)
    assert store.items() == before
    assert bool(before) == hit
    if hit:
        assert compile_model(spec, store=store, environment=environment, check_weights=False).cached


@pytest.mark.slow  # a process that imports transformers
def test_wrong_weights_cost_a_start_no_compile(
    wrong_weights_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "empty"))
    with pytest.raises(WeightsError, match=r"no such tensor in model\.safetensors, nor"):
        LLM(wrong_weights_dir, backend="eager")
    assert DirectoryStore(tmp_path / "empty").items() == ()


def test_streams_beside_each_other(eager: CompiledModel, weights_dir: Path, reference: nn.Module) -> None:
    prompts = mixed_prompts(6)

    async def read(llm: LLM, prompt: list[int]) -> list[int]:
        return [token.token async for delta in llm.stream(prompt, PARAMS) for token in delta.tokens]

    async def read_all(llm: LLM) -> list[list[int]]:
        return await asyncio.gather(*(read(llm, prompt) for prompt in prompts))

    with LLM(weights_dir, bundle=eager.bundle.path, kv_cache_memory=100 * BLOCK_BYTES) as llm:
        for prompt, tokens in zip(prompts, asyncio.run(read_all(llm)), strict=True):
            assert_greedy(reference, prompt, tokens)


@pytest.mark.slow
def test_a_native_model_takes_over_from_an_eager_one(
    eager: CompiledModel, float32: CompiledModel, weights_dir: Path, reference: nn.Module
) -> None:
    prompts = mixed_prompts(8)
    sizes = EngineConfig(num_blocks=40, max_tokens=32, max_seqs=8)
    model = load(eager.bundle, weights=reference)
    engine = AsyncEngine(engine_for(model, sizes, model_config=read_config(weights_dir), tokenizer=None))
    tokens: dict[str, list[int]] = {}
    requests = [GenerationRequest(str(i), tuple(prompt), PARAMS) for i, prompt in enumerate(prompts)]
    for number, output in enumerate(engine.run(requests)):
        tokens.setdefault(output.request_id, []).append(output.sampled.token)
        if number == 50:
            engine.swap_runner(load(float32.bundle, weights=reference))
    assert engine.stats().preemptions > 0
    engine.close()
    for index, prompt in enumerate(prompts):
        assert_greedy(reference, prompt, tokens[str(index)])
