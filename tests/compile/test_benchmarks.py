"""What benchmarks and `piecework bench` run, for real but small: bundles of the eager backend, tiny models."""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.cells import mla_layers
from benchmarks.cells.chats import send_all
from benchmarks.common.chats import ChatLoad, figures_of
from benchmarks.common.models import RANDOM_MODELS
from piecework import LLM
from piecework.cli.main import main
from piecework.models.sample_batches import Batch
from tests.unit.benchmarks.stubs import value_of, write_stub

BATCHES = [Batch(decode=3, decode_context=37), Batch(decode=2, decode_context=16, prompts=1, prompt_tokens=9)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return a random model's directory and its bundle, by the model's name."""
    root = tmp_path_factory.mktemp("bench")

    @functools.cache
    def compile_(name: str) -> tuple[Path, Path]:
        model = RANDOM_MODELS[name].write(root / name, dtype="float32")
        words = ["compile", str(model), "--out", str(model / "bundle"), "--backend", "eager"]
        assert main(words) == 0
        return model, model / "bundle"

    return compile_


@pytest.mark.slow
def test_forwards_of_several_bundles_are_timed(compiled: Callable[[str], tuple[Path, Path]]) -> None:
    models = [mla_layers.open_model(*compiled("mla-tiny")) for _ in range(2)]
    found = mla_layers.measure(models, BATCHES, steps=2, seconds=0.0)
    assert [len(rates) for rates in found] == [2, 2]
    assert all(rate > 0 for rates in found for rate in rates)
    for model in models:
        (state,) = {tuple(state.shape) for state in model.states.values()}
        assert state[0] == BATCHES[-1].num_blocks
        assert all(state.std() > 0.5 for state in model.states.values())  # what is in the cache is something


@pytest.mark.slow
def test_chats_are_sent_at_once_and_every_token_has_its_time(compiled: Callable[[str], tuple[Path, Path]]) -> None:
    model, bundle = compiled("llama-tiny")
    chats = ChatLoad(4, 20, 8, 64).draw(vocab=1024)
    with LLM(model, bundle=bundle, kv_cache_memory=1 << 24, prefix_caching=False) as llm:
        outcomes = asyncio.run(send_all(llm, chats))
    assert [len(outcome.token_s) for outcome in outcomes] == [output for _, output in chats]
    for outcome in outcomes:
        assert list(outcome.token_s) == sorted(outcome.token_s)
    first_s = max(outcome.begin_s + outcome.token_s[0] for outcome in outcomes)
    assert first_s < min(outcome.begin_s + outcome.token_s[-1] for outcome in outcomes)  # none waited for another's end
    figures = figures_of(outcomes)
    assert figures["output_throughput"] / figures["request_throughput"] == pytest.approx(sum(n for _, n in chats) / 4)


def test_bench_measures_a_model(
    compiled: Callable[[str], tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    model, bundle = compiled("llama-tiny")
    capsys.readouterr()  # what the compile said, if it was this test's
    words = ["bench", str(model), "--bundle", str(bundle), "--requests", "3", "--input", "9", "--output", "5"]
    words += ["--runs", "2", "--starts", "0", "--kv-memory", "16MiB"]
    assert main([*words, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    figures = made["figures"]
    assert set(figures) == {"output_tok_s", "total_tok_s", "one_request_tok_s"}
    assert all(figure["max"] >= figure["value"] >= figure["min"] > 0 for figure in figures.values())
    assert {figure["n"] for figure in figures.values()} == {2}
    # three requests of 5 tokens after 9
    assert figures["total_tok_s"]["value"] == pytest.approx(figures["output_tok_s"]["value"] * 14 / 5, rel=1e-3)
    assert made["bundle"] == str(bundle)
    assert made["isa"]


def test_bench_starts_the_model_in_new_processes(
    compiled: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, bundle = compiled("llama-tiny")
    stub = write_stub(tmp_path / "stub", {"generate": {"first_token_s": 1.5, "load_ms": 7.0}})
    monkeypatch.setattr(sys, "executable", str(stub.python))
    words = ["bench", str(model), "--bundle", str(bundle), "--requests", "1", "--input", "4", "--output", "2"]
    words += ["--runs", "1", "--starts", "2", "--kv-memory", "16MiB"]
    assert main([*words, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures["first_token_s"] == {"value": 1.5, "n": 2, "min": 1.5, "max": 1.5}
    assert figures["load_ms"]["value"] == 7.0
    assert stub.names() == ["generate"] * 3  # the first one isn't counted
    assert value_of(stub.calls()[0], "--bundle") == str(bundle)


def test_bench_without_a_tokenizer_has_no_starts(
    compiled: Callable[[str], tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, bundle = compiled("llama-tiny")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(model / name)
    words = ["--bundle", str(bundle), "--requests", "1", "--input", "4", "--output", "2", "--runs", "1"]
    assert main(["bench", str(tmp_path), *words, "--kv-memory", "16MiB"]) == 0
    shown = capsys.readouterr()
    assert "no starts: piecework generate needs a tokenizer.json" in shown.err
    assert [line.split()[0] for line in shown.out.splitlines()[4:]] == [
        "output_tok_s", "total_tok_s", "one_request_tok_s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "given", [["--requests", "0"], ["--starts", "-1"], ["--kv-memory", "much"], ["--dtype", "int8"]]
)
def test_bench_refuses_wrong_usage(given: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "model", *given])
    assert caught.value.code == 2
