"""`LLM` over a bundle that is written by hand: one operator, which continues every letter with the next one."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

import piecework
from piecework.bundle import BundleContent, environment_facts, write_bundle
from piecework.bundle.facts import config_fact
from piecework.bundle.plan import OpStep, Plan, PlanInput, Recipe, State
from piecework.bundle.record import Record
from piecework.engine.llm import LLM
from piecework.engine.request import FinishReason
from piecework.engine.sampling_params import SamplingParams
from piecework.errors import CapacityError, EngineError, RequestError, StaleBundle, WeightsError

VOCAB = 60
END = 26
BLOCK_BYTES = 2 * 16 * 1 * 4 * 4
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": VOCAB,
    "eos_token_id": END,
    "max_position_embeddings": 64,
}


@torch.library.custom_op("pwllm::next_letter", mutates_args=())
def next_letter(tokens: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    assert weight.shape == (2, 3)
    return torch.nn.functional.one_hot((tokens[wanted] + 1) % VOCAB, VOCAB).float()


PLAN = Plan(
    sizes={"tokens": (1, 8), "seqs": (1, 4), "blocks": (1, 1 << 30)},
    primary="tokens",
    inputs=(
        PlanInput("input_ids", shape=("tokens",), dtype="int64", device="cpu"),
        PlanInput("logits_indices", shape=("seqs",), dtype="int64", device="cpu"),
    ),
    states=(State("kv", (2, "blocks", 16, 1, 4), dtype="float32", device="cpu"),),
    recipes=(Recipe("a.weight", (2, 3), "float32"),),
    pieces=(),
    instances=(),
    steps=(OpStep("pwllm::next_letter", ({"slot": 0}, {"slot": 1}, {"recipe": 0}), {}, (2,)),),
    num_slots=3,
    output_slots=(2,),
    structure={"slot": 0},
)

Make = Callable[..., LLM]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    alphabet = {chr(ord("a") + i): i for i in range(26)} | {"</s>": END}
    tokenizer = HuggingFaceTokenizer(models.WordLevel(alphabet, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def make(model_dir: Path) -> Any:
    facts = (*environment_facts(), config_fact(CONFIG))
    bundle = write_bundle(
        model_dir / "bundle", BundleContent(plan=PLAN.to_json(), artifacts={}, facts=facts, record=Record())
    )
    made = []

    def make(*, blocks: int = 40, **options: Any) -> LLM:
        given = {"kv_cache_memory": blocks * BLOCK_BYTES, "random_weights": 0, "bundle": bundle.path, **options}
        made.append(LLM(model_dir, **given))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def test_texts_in_texts_out(make: Make) -> None:
    llm = make()
    found = llm.generate(["abc", "wx", "p"], SamplingParams(max_tokens=3))
    assert [completion.text for completion in found] == ["def", "yz", "qrs"]
    assert [completion.finish_reason for completion in found] == [
        FinishReason.LENGTH,
        FinishReason.STOP,
        FinishReason.LENGTH,
    ]
    assert found[1].tokens == (24, 25, END)
    assert found[1].prompt == (22, 23)
    assert (llm.stats().generated_tokens, llm.stats().kv_blocks_total) == (9, 40)


def test_one_text_and_tokens(make: Make) -> None:
    llm = make()
    assert llm.generate("a", SamplingParams(max_tokens=2))[0].text == "bc"
    assert [c.text for c in llm.generate([[0, 1], (2,)], SamplingParams(max_tokens=2))] == ["cd", "de"]
    assert llm.generate([]) == []


def test_parameters_for_each(make: Make) -> None:
    llm = make()
    each = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2, n=2, logprobs=1)]
    first, second = llm.generate(["a", "a"], each)
    assert (first.text, first.continuations[0].logprobs) == ("b", None)
    assert [c.text for c in second.continuations] == ["bc", "bc"]
    assert second.continuations[1].logprobs is not None
    assert [token.token for token in second.continuations[1].logprobs] == [1, 2]
    with pytest.raises(RequestError, match="1 SamplingParams"):
        llm.generate(["a", "b"], each[:1])


def test_nothing_runs_where_one_of_the_prompts_can_not(make: Make) -> None:
    llm = make()
    for prompts in (["a", ""], [[1], [VOCAB]], [[1], [1] * 64]):
        with pytest.raises(RequestError):
            llm.generate(prompts)
    with pytest.raises(RequestError, match="list of such lists"):
        llm.generate([1, 2])  # type: ignore[list-item]
    assert llm.stats().steps == 0


def test_a_stream(make: Make) -> None:
    llm = make()

    async def read() -> list[str]:
        return [delta.text async for delta in llm.stream("a", SamplingParams(max_tokens=20, stop=["fgh"]))]

    texts = asyncio.run(read())
    assert "".join(texts) == "bcde"
    assert len(texts) == 7

    async def read_one() -> None:
        async with aclosing(llm.stream("a", SamplingParams(max_tokens=60))) as deltas:
            async for _ in deltas:
                break

    asyncio.run(read_one())
    llm.generate("a", SamplingParams(max_tokens=1))
    assert llm.stats().running == 0

    async def read_two() -> None:
        async for _ in llm.stream("a", SamplingParams(n=2)):
            pass

    with pytest.raises(RequestError, match="n=1"):
        asyncio.run(read_two())


def test_closing(make: Make) -> None:
    llm = make(max_seqs=1)
    llm.close()
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.generate("a")


def test_the_cache_is_as_large_as_asked_for(make: Make) -> None:
    assert make(blocks=7).stats().kv_blocks_total == 7
    smaller = make(kv_cache_memory=None, memory_fraction=0.0001).stats().kv_blocks_total
    assert smaller < make(kv_cache_memory=None, memory_fraction=0.0002).stats().kv_blocks_total
    with pytest.raises(CapacityError):
        make(kv_cache_memory=BLOCK_BYTES - 1)


def test_without_a_tokenizer_there_are_tokens(make: Make, model_dir: Path) -> None:
    (model_dir / "tokenizer.json").unlink()
    llm = make()
    (found,) = llm.generate([[3]], SamplingParams(max_tokens=3))
    assert (found.text, found.tokens) == ("", (4, 5, 6))
    with pytest.raises(RequestError, match=r"no tokenizer\.json"):
        llm.generate("a")
    with pytest.raises(RequestError, match=r"no tokenizer\.json"):
        llm.generate([[3]], SamplingParams(stop="x"))


def test_without_weights_it_is_not_made(make: Make) -> None:
    with pytest.raises(WeightsError):
        make(random_weights=None)


def test_a_bundle_of_another_model_is_refused(make: Make, model_dir: Path) -> None:
    assert make().bundle.path == model_dir / "bundle"
    (model_dir / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 16}))
    with pytest.raises(StaleBundle):
        make()


def test_its_names_are_public_and_need_no_compiler() -> None:
    assert piecework.LLM is LLM
    assert piecework.SamplingParams is SamplingParams
    code = (
        "import sys, piecework; piecework.LLM; piecework.SamplingParams; "
        "bad = {'sympy', 'torch._dynamo', 'torch._inductor', 'triton', 'transformers', 'jinja2'} & set(sys.modules); "
        "raise SystemExit(f'imported {sorted(bad)}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
