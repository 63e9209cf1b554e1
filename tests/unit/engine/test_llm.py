"""`LLM`: from arguments to the engine and back, with a made-up model in place of a loaded bundle."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

import piecework
from piecework.bundle.facts import config_fact
from piecework.bundle.plan import Recipe, State
from piecework.engine import llm as llm_module
from piecework.engine.bundles import FoundBundle
from piecework.engine.llm import LLM
from piecework.engine.request import FinishReason
from piecework.engine.sampling_params import SamplingParams
from piecework.errors import CapacityError, EngineError, RequestError, StaleBundle

VOCAB = 60
END = 26
BLOCK_BYTES = 2 * 16 * 1 * 4 * 4


class AlphabetModel:
    """Continues every letter with the next one."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.closed = False
        self.step_s = 0.0

    def make_states(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)

    def run(self, inputs: Mapping[str, Tensor | int]) -> list[Tensor]:
        tokens, wanted = inputs["input_ids"], inputs["logits_indices"]
        assert isinstance(tokens, Tensor)
        assert len(tokens) <= 8
        time.sleep(self.step_s)
        return [torch.nn.functional.one_hot((tokens[wanted] + 1) % VOCAB, VOCAB).float()]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put the made-up model behind `load` and `find_or_compile`; return what those were called with."""
    alphabet = {chr(ord("a") + i): i for i in range(26)} | {"</s>": END}
    tokenizer = HuggingFaceTokenizer(models.WordLevel(alphabet, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB,
        "eos_token_id": END,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    seen: dict[str, Any] = {"dir": tmp_path, "model": AlphabetModel(), "config": config}
    plan = SimpleNamespace(
        sizes={"tokens": (1, 8), "seqs": (1, 4)},
        recipes=[Recipe("a.weight", (2, 3), "float32")],
        states=[State("kv", (2, "blocks", 16, 1, 4), "float32", "cpu")],
    )

    def open_bundle(path: Path, **_: Any) -> Any:
        return SimpleNamespace(path=path, plan=dict, facts=(config_fact(seen["config"]),))

    def find_or_compile(config: Any, **options: Any) -> FoundBundle:
        seen["find"] = (options["dtype"], options["max_tokens"], options["device"])
        return FoundBundle(open_bundle(tmp_path / "stored"), compiled=False, verify_s=0.0)

    def load(bundle: Any, *, weights: Any, check_facts: bool) -> AlphabetModel:
        assert not check_facts  # they were checked when the bundle was found
        seen["load"] = (bundle.path, weights.names())
        return seen["model"]

    monkeypatch.setattr(llm_module, "find_or_compile", find_or_compile)
    monkeypatch.setattr(llm_module, "open_bundle", open_bundle)
    monkeypatch.setattr(llm_module, "load", load)
    monkeypatch.setattr(llm_module.Plan, "from_json", staticmethod(lambda data: plan))
    return seen


@pytest.fixture
def llm(calls: dict[str, Any]) -> Iterator[LLM]:
    with LLM(calls["dir"], random_weights=0, kv_cache_memory=40 * BLOCK_BYTES) as made:
        yield made


def test_texts_in_texts_out(llm: LLM, calls: dict[str, Any]) -> None:
    found = llm.generate(["abc", "wx", "p"], SamplingParams(max_tokens=3))
    assert [completion.text for completion in found] == ["def", "yz", "qrs"]
    assert [completion.finish_reason for completion in found] == [
        FinishReason.LENGTH,
        FinishReason.STOP,
        FinishReason.LENGTH,
    ]
    assert found[1].tokens == (24, 25, END)
    assert found[1].prompt == (22, 23)
    assert calls["find"] == ("float32", 2048, "cpu")
    assert calls["load"] == (calls["dir"] / "stored", ["a.weight"])
    assert calls["model"].sizes == {"blocks": 40}
    assert llm.stats().generated_tokens == 9


def test_one_text_and_tokens(llm: LLM) -> None:
    assert llm.generate("a", SamplingParams(max_tokens=2))[0].text == "bc"
    assert [c.text for c in llm.generate([[0, 1], (2,)], SamplingParams(max_tokens=2))] == ["cd", "de"]
    assert llm.generate([]) == []


def test_parameters_for_each(llm: LLM) -> None:
    each = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2, n=2, logprobs=1)]
    first, second = llm.generate(["a", "a"], each)
    assert (first.text, first.continuations[0].logprobs) == ("b", None)
    assert [c.text for c in second.continuations] == ["bc", "bc"]
    assert second.continuations[1].logprobs is not None
    assert [token.token for token in second.continuations[1].logprobs] == [1, 2]
    with pytest.raises(RequestError, match="1 SamplingParams"):
        llm.generate(["a", "b"], each[:1])


def test_a_stop_string_ends_a_text_and_frees_its_blocks(llm: LLM, calls: dict[str, Any]) -> None:
    calls["model"].step_s = 0.01  # so that whoever reads keeps up
    (found,) = llm.generate("a", SamplingParams(max_tokens=20, n=3, stop="ef"))
    for continuation in found.continuations:
        assert (continuation.text, continuation.stop) == ("bcd", "ef")
        assert continuation.finish_reason is FinishReason.STOP
        assert continuation.tokens == (1, 2, 3, 4, 5)
    assert llm.generate("a", SamplingParams(max_tokens=1))[0].text == "b"
    assert llm.stats().kv_blocks_used == 0
    assert llm.stats().generated_tokens < 3 * 20


def test_logprobs_of_the_prompt(llm: LLM) -> None:
    (found,) = llm.generate("abz", SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert found.prompt_logprobs is not None
    assert [score and score.token for score in found.prompt_logprobs] == [None, 1, 25]


def test_nothing_runs_where_one_of_the_prompts_can_not(llm: LLM) -> None:
    for prompts in (["a", ""], [[1], [VOCAB]], [[1], [1] * 64]):
        with pytest.raises(RequestError):
            llm.generate(prompts)
    with pytest.raises(RequestError, match="list of such lists"):
        llm.generate([1, 2])  # type: ignore[list-item]
    assert llm.stats().steps == 0


def test_a_stream(llm: LLM) -> None:
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


def test_closing(calls: dict[str, Any]) -> None:
    llm = LLM(calls["dir"], random_weights=0, kv_cache_memory=10 * BLOCK_BYTES, max_seqs=1)
    llm.close()
    llm.close()
    assert calls["model"].closed
    with pytest.raises(EngineError, match="closed"):
        llm.generate("a")


def test_the_cache_is_a_fraction_of_free_memory(calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = llm_module.read_memory("cpu")
    free = 64 * (10 * BLOCK_BYTES + 8000)
    monkeypatch.setattr(llm_module, "read_memory", lambda device: type(memory)(total=64 * free, free=free))
    with LLM(calls["dir"], random_weights=0, memory_fraction=0.25):
        half = calls["model"].sizes["blocks"]
    with LLM(calls["dir"], random_weights=0):
        assert calls["model"].sizes["blocks"] in (2 * half, 2 * half + 1)
    with pytest.raises(CapacityError):
        LLM(calls["dir"], random_weights=0, kv_cache_memory=BLOCK_BYTES - 1)


def test_without_a_tokenizer_there_are_tokens(calls: dict[str, Any]) -> None:
    (calls["dir"] / "tokenizer.json").unlink()
    with LLM(calls["dir"], random_weights=0, kv_cache_memory=10 * BLOCK_BYTES) as llm:
        (found,) = llm.generate([[3]], SamplingParams(max_tokens=3))
        assert (found.text, found.tokens) == ("", (4, 5, 6))
        with pytest.raises(RequestError, match=r"no tokenizer\.json"):
            llm.generate("a")
        with pytest.raises(RequestError, match=r"no tokenizer\.json"):
            llm.generate([[3]], SamplingParams(stop="x"))


def test_a_bundle_of_another_model_is_refused(calls: dict[str, Any]) -> None:
    with LLM(calls["dir"], random_weights=0, kv_cache_memory=10 * BLOCK_BYTES, bundle="given.pwb") as llm:
        assert llm.bundle.path == Path("given.pwb")
    calls["config"] = {"model_type": "llama", "hidden_size": 16}
    with pytest.raises(StaleBundle):
        LLM(calls["dir"], random_weights=0, bundle="other.pwb")


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
