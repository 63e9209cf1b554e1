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

import piecework
from piecework.bundle.bundle import copy_bundle
from piecework.bundle.signatures import Head, add_signature, make_key, read_key
from piecework.bundle.store.directory import DirectoryStore
from piecework.engine.llm import LLM
from piecework.engine.request import FinishReason
from piecework.engine.sampling_params import SamplingParams
from piecework.errors import (
    CapacityError,
    CompileError,
    EngineError,
    RequestError,
    StaleBundle,
    StoreError,
    UntrustedBundle,
    WeightsError,
)
from piecework.spec.model_spec import ModelSpec
from tests.unit.engine.letters import TEMPLATE
from tests.unit.engine.next_letter import (
    BLOCK_BYTES,
    CONFIG,
    END,
    VOCAB,
    letter_content,
    write_letter_bundle,
    write_model_dir,
)

Make = Callable[..., LLM]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_model_dir(tmp_path)


@pytest.fixture
def make(model_dir: Path) -> Any:
    bundle = write_letter_bundle(model_dir)
    made = []

    def make(*, blocks: int = 40, model: Any = model_dir, **options: Any) -> LLM:
        given = {"kv_cache_memory": blocks * BLOCK_BYTES, "random_weights": 0, "bundle": bundle.path, **options}
        made.append(LLM(model, **given))
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


def test_conversations(make: Make, tmp_path: Path) -> None:
    (tmp_path / "talk.jinja").write_text(TEMPLATE)
    llm = make(chat_template=tmp_path / "talk.jinja")
    params = SamplingParams(max_tokens=3)
    talk = [{"role": "user", "content": "abc"}]
    (one,) = llm.chat(talk, params)
    several = llm.chat([talk, talk], [params, params], tools=[{"function": {"name": "kl"}}])
    assert one == llm.generate("abc", params)[0]
    assert [made.text for made in several] == [llm.generate("abckl", params)[0].text] * 2
    with pytest.raises(RequestError, match="chat template"):
        make().chat(talk)


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


def test_the_stores_bundle_is_that_of_the_options(
    make: Make, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    store = DirectoryStore(tmp_path / "home")
    options = {"dtype": "bfloat16", "ranges": "1,2:8", "max_tokens": 8, "passes_off": ["merge_linear"]}
    spec = ModelSpec.of(model_dir, **options)
    stored = store.put_bundle(spec.key, content=letter_content(spec))
    notes: list[str] = []
    for llm in (make(bundle=None, on_note=notes.append, **options), make(bundle=None, model=spec)):
        assert llm.bundle.path == stored.path
        assert llm.generate("a", SamplingParams(max_tokens=2))[0].text == "bc"
    assert not notes


def test_a_given_bundle_has_the_options_that_are_asked_for(make: Make) -> None:
    with pytest.raises(StaleBundle, match="option max_tokens: bundle 2048, here 8"):
        make(max_tokens=8)


def test_options_that_it_has_not(make: Make, model_dir: Path) -> None:
    with pytest.raises(CompileError, match="did you mean max_tokens"):
        make(max_token=8)
    with pytest.raises(CompileError, match="a ModelSpec, which says how it is compiled already"):
        make(model=ModelSpec.of(model_dir), dtype="bfloat16")
    with pytest.raises(RequestError, match="memory_fraction=2"):
        make(memory_fraction=2)


def test_its_names_are_public_and_need_no_compiler() -> None:
    assert piecework.LLM is LLM
    assert piecework.SamplingParams is SamplingParams
    code = (
        "import sys, piecework; piecework.LLM; piecework.SamplingParams; "
        "bad = {'sympy', 'torch._dynamo', 'torch._inductor', 'triton', 'transformers', 'huggingface_hub', 'jinja2'}; "
        "bad &= set(sys.modules); "
        "raise SystemExit(f'imported {sorted(bad)}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_bundle_that_is_named_must_be_signed_where_keys_are_trusted(
    make: Make, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_key(tmp_path / "key")
    trust = tmp_path / "key.pub"
    with pytest.raises(UntrustedBundle, match="it is not signed"):
        make(trust=trust)
    bundle = write_letter_bundle(model_dir)
    with pytest.raises(UntrustedBundle, match="it is not signed"):
        piecework.load(bundle.path, weights={}, trust=trust)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("PIECEWORK_TRUST", "require")
    with pytest.raises(StoreError, match=r"cat MAKER\.pub >> .*piecework/trusted_keys"):
        make()
    (tmp_path / "piecework").mkdir()
    trust.rename(tmp_path / "piecework/trusted_keys")
    with pytest.raises(UntrustedBundle, match="it is not signed"):
        make()
    with pytest.raises(UntrustedBundle, match="it is not signed"):
        piecework.load(bundle.path, weights={})
    head = bundle.head()
    signed = Head(head.manifest, add_signature(head, read_key(tmp_path / "key"), bundle="b"))
    copy_bundle(bundle, to=tmp_path / "signed.pwb", head=signed)
    assert make(bundle=tmp_path / "signed.pwb").generate("a", SamplingParams(max_tokens=2))[0].text == "bc"


def test_what_travels_is_imported_only_where_it_is_wanted() -> None:
    names = "fsspec", "oras", "requests", "s3fs", "cryptography"
    code = f"import sys, piecework.engine.opening, piecework.cli.store; print(set({names}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
