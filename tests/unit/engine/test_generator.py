"""Generation with a made-up model, and with transformers' models on the attention op."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from piecework.engine.generator import Generator, num_blocks_needed
from piecework.engine.request import FinishReason, SamplingParams
from piecework.errors import CapacityError, RequestError
from piecework.models.config import ModelConfig, read_config
from tests.unit.models.tiny import FAMILIES, eager_pair, write_config

VOCAB = 131


class CountingModel:
    """Continues every token with the next one, and notes what it is run on."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.num_tokens: list[int] = []

    def make_states(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)

    def run(self, inputs: Mapping[str, Tensor | int]) -> list[Tensor]:
        tokens, wanted = inputs["input_ids"], inputs["logits_indices"]
        assert isinstance(tokens, Tensor)
        assert isinstance(wanted, Tensor)
        self.num_tokens.append(len(tokens))
        return [torch.nn.functional.one_hot((tokens[wanted] + 1) % VOCAB, VOCAB).float()]


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    return read_config(write_config(tmp_path, "llama"))  # 512 positions, stop token 2


def texts(generator: Generator, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for event in generator.generate(prompts, params):
        found[event.prompt_index].append(event.token)
    return found


def test_several_prompts_in_small_batches(config: ModelConfig) -> None:
    model = CountingModel()
    generator = Generator(model, config, num_blocks=6, max_tokens=5)
    assert model.sizes == {"blocks": 6}
    prompts = [list(range(10, 31)), [50], [60, 61, 62]]
    found = texts(generator, prompts, SamplingParams(max_new_tokens=7))
    assert found == [list(range(31, 38)), list(range(51, 58)), list(range(63, 70))]
    assert max(model.num_tokens) <= 5
    assert generator.num_free_blocks == 6


def test_stop_tokens(config: ModelConfig) -> None:
    generator = Generator(CountingModel(), config, num_blocks=6, max_tokens=64)
    prompt = [[127]]
    events = list(generator.generate(prompt, SamplingParams(max_new_tokens=20)))
    assert [event.token for event in events] == [128, 129, 130, 0, 1, 2]
    assert events[-1].finish_reason is FinishReason.STOP
    assert texts(generator, prompt, SamplingParams(max_new_tokens=20, stop_token_ids=(129,))) == [[128, 129]]
    assert len(texts(generator, prompt, SamplingParams(max_new_tokens=20, ignore_eos=True))[0]) == 20


def test_a_text_ends_where_the_positions_do(config: ModelConfig) -> None:
    generator = Generator(CountingModel(), config, num_blocks=32, max_tokens=512)
    events = list(generator.generate([[5] * 510], SamplingParams(max_new_tokens=9)))
    assert len(events) == 2
    assert events[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("prompt", "found"), [([5] * 512, "512 tokens"), ([VOCAB], "token 131"), ([-1], "token -1"), ([], "without tokens")]
)
def test_impossible_prompts_are_refused_at_once(config: ModelConfig, prompt: list[int], found: str) -> None:
    generator = Generator(CountingModel(), config, num_blocks=40, max_tokens=64)
    with pytest.raises(RequestError, match=found):
        generator.generate([prompt], SamplingParams())


def test_more_than_the_cache_holds_is_refused(config: ModelConfig) -> None:
    generator = Generator(CountingModel(), config, num_blocks=2, max_tokens=64)
    with pytest.raises(CapacityError):
        generator.generate([[5] * 30], SamplingParams(max_new_tokens=3))


def test_blocks_come_back_when_the_caller_stops_early(config: ModelConfig) -> None:
    generator = Generator(CountingModel(), config, num_blocks=6, max_tokens=64)
    events = generator.generate([[5], [6]], SamplingParams(max_new_tokens=20))
    next(events)
    assert generator.num_free_blocks < 6
    events.close()  # type: ignore[attr-defined]
    assert generator.num_free_blocks == 6


def test_blocks_needed(config: ModelConfig) -> None:
    prompts, params = [[5] * 16, [5], [5] * 511], SamplingParams(max_new_tokens=16)
    assert num_blocks_needed(prompts, params, config) == 2 + 2 + 32


@pytest.mark.parametrize("family", FAMILIES)
def test_64_greedy_tokens_equal_transformers(tmp_path: Path, family: str) -> None:
    reference, model = eager_pair(tmp_path, family, max_tokens=16)
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (length,), generator=random).tolist() for length in (21, 1, 7)]
    wanted = [_transformers_tokens(reference, prompt) for prompt in prompts]
    params = SamplingParams(max_new_tokens=64, ignore_eos=True)
    config = read_config(tmp_path)
    num_blocks = num_blocks_needed(prompts, params, config)
    together = Generator(model, config, num_blocks=num_blocks, max_tokens=16)
    assert texts(together, prompts, params) == wanted
    assert texts(together, prompts[:1], params) == wanted[:1]


def _transformers_tokens(model: Any, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=64, do_sample=False, eos_token_id=None
    )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def test_sampled_tokens_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    _, model = eager_pair(tmp_path, "llama", max_tokens=16)
    generator = Generator(model, read_config(tmp_path), num_blocks=20, max_tokens=16)
    params = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True)
    alone = texts(generator, [[5, 6, 7]], params)[0]
    assert texts(generator, [[9] * 20, [5, 6, 7]], params)[1] == alone


def test_the_engine_imports_no_compiler_and_no_transformers() -> None:
    code = (
        "import sys, piecework.engine.generator, piecework.engine.tokenizer; "
        "bad = {'sympy', 'torch._dynamo', 'torch._inductor', 'triton', 'transformers', 'jinja2'} & set(sys.modules); "
        "raise SystemExit(f'imported {sorted(bad)}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
