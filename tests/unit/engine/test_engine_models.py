"""The engine with transformers' models on the attention op: 64 greedy tokens are transformers' own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from piecework.engine.engine import Engine, EngineConfig, engine_for
from piecework.engine.output import Stats
from piecework.engine.request import GenerationRequest
from piecework.engine.sampling_params import SamplingParams
from piecework.spec.config import read_config
from tests.choice import slow_but
from tests.unit.engine.paged_model import Collected, run_all
from tests.unit.models.tiny import FAMILIES, HYBRID_FAMILIES, LATENT_FAMILIES, MORE_FAMILIES, EagerModel, eager_pair

VOCAB = 131
NUM_TOKENS = 64


def make_engine(model: EagerModel, model_dir: Path, **sizes: int) -> Engine:
    config = read_config(model_dir)
    made = EngineConfig(prefix_caching=config.model_type not in HYBRID_FAMILIES, **sizes)
    return engine_for(model, made, model_config=config, tokenizer=None)  # type: ignore[arg-type]


def run(engine: Engine, prompts: list[list[int]], **params: Any) -> tuple[list[list[int]], Stats]:
    for index, prompt in enumerate(prompts):
        params = {"max_tokens": NUM_TOKENS, "ignore_eos": True, **params}
        engine.add(GenerationRequest(str(index), tuple(prompt), SamplingParams(**params)))
    found = Collected()
    run_all(engine, found)
    return [found.tokens[str(index), 0] for index in range(len(prompts))], engine.stats()


def assert_greedy(reference: Any, prompt: list[int], tokens: list[int]) -> None:
    """Assert that each token is transformers' likeliest after those before it, which is what makes a text greedy."""
    assert len(tokens) == NUM_TOKENS
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + tokens])).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == tokens


def transformers_tokens(reference: Any, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    made = reference.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
    )
    found: list[int] = made[0, len(prompt) :].tolist()
    return found


def mixed_prompts(count: int) -> list[list[int]]:
    """Return prompts of 1 to 40 tokens; every other one begins like others."""
    rng = random.Random(5)
    stem = [rng.randrange(3, VOCAB) for _ in range(33)]
    prompts = []
    for index in range(count):
        own = [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 8 if index % 2 else 40))]
        prompts.append(stem[: rng.choice((16, 32, 33))] + own if index % 2 else own)
    return prompts


@pytest.mark.parametrize(
    "family", slow_but([*FAMILIES, *MORE_FAMILIES, *HYBRID_FAMILIES, *LATENT_FAMILIES], "qwen3", "qwen3_next")
)
def test_alone_and_in_a_mixed_batch_with_preemptions(tmp_path: Path, family: str) -> None:
    reference, model = eager_pair(tmp_path, family, max_tokens=24)
    prompts = mixed_prompts(20)
    # 12 sequences at a time grow to up to 7 blocks each, and share 30
    engine = make_engine(model, tmp_path, num_blocks=30, max_tokens=24, max_seqs=12)
    found, stats = run(engine, prompts)
    for prompt, tokens in zip(prompts, found, strict=True):
        assert_greedy(reference, prompt, tokens)
    assert stats.preemptions > 0
    assert (stats.prefix_hit_tokens > 0) is (family not in HYBRID_FAMILIES)
    assert stats.kv_blocks_used == 0
    alone = make_engine(model, tmp_path, num_blocks=8, max_tokens=24, max_seqs=1)
    assert run(alone, prompts[5:6])[0] == found[5:6] == [transformers_tokens(reference, prompts[5])]


def test_a_prompt_in_chunks_and_one_that_is_cached(tmp_path: Path) -> None:
    reference, model = eager_pair(tmp_path, "llama", max_tokens=16)
    prompt = [3 + (7 * position) % 120 for position in range(64)]
    wanted = transformers_tokens(reference, prompt)
    engine = make_engine(model, tmp_path, num_blocks=20, max_tokens=16, max_seqs=4)
    assert run(engine, [prompt])[0] == [wanted]
    runs = model.num_runs
    again, stats = run(engine, [prompt])
    assert again == [wanted]
    assert stats.prefix_hit_tokens == 48  # of four full blocks, the last one is computed again
    assert model.num_runs - runs == NUM_TOKENS


def test_sampled_tokens_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    _, model = eager_pair(tmp_path, "llama", max_tokens=16)
    params = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    prompts = mixed_prompts(6)
    together = make_engine(model, tmp_path, num_blocks=12, max_tokens=16, max_seqs=6)
    found, stats = run(together, prompts, **params)
    assert stats.preemptions > 0
    for prompt, tokens in zip(prompts, found, strict=True):
        alone = make_engine(model, tmp_path, num_blocks=12, max_tokens=16, max_seqs=6)
        assert run(alone, [prompt], **params)[0] == [tokens]
