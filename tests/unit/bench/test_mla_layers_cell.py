"""The cell that times forwards by regime, in this process: no compiler runs here."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from piecework.bench.cells import mla_layers
from piecework.bench.cells.forward import StepTimes
from piecework.bench.cells.mla_batch import Batch
from piecework.bench.cells.mla_layers import batch_inputs, measure
from piecework.bench.cells.module import build_module
from piecework.bench.random_models import RANDOM_MODELS
from piecework.capture.request import CaptureRequest

DECODE = Batch(decode=3, decode_context=37)
FRESH = Batch(prompts=2, prompt_tokens=20)
CACHED = Batch(prompts=2, prompt_tokens=5, prompt_context=32)
MIXED = Batch(decode=2, decode_context=16, prompts=1, prompt_tokens=9)


def tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch_inputs(batch).items() if isinstance(value, Tensor)}


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> CaptureRequest:
    model = RANDOM_MODELS["mla-tiny"].write(tmp_path_factory.mktemp("models") / "m", dtype="float32")
    made = build_module(model, max_tokens=64, blocks=16)
    for part in made.module.modules():
        if hasattr(part, "absorb"):
            part.absorb()
    return made


@pytest.mark.parametrize(
    ("batch", "regime", "context", "tokens"),
    [(DECODE, "decode", 37, 3), (FRESH, "prefill", 0, 40), (CACHED, "prefill", 32, 10), (MIXED, "mixed", 16, 11)],
)
def test_a_batch_says_what_it_is(batch: Batch, regime: str, context: int, tokens: int) -> None:
    assert (batch.regime, batch.context, batch.num_tokens) == (regime, context, tokens)
    inputs = batch_inputs(batch)
    assert inputs["num_decode_tokens"] == batch.decode
    assert inputs["num_prefill_tokens"] == tokens - batch.decode


@pytest.mark.parametrize("batch", [DECODE, FRESH, CACHED, MIXED])
def test_every_token_has_a_place_of_its_own_after_what_is_cached(batch: Batch) -> None:
    given = tensors(batch)
    starts, counts = zip(*batch.sequences(), strict=True)
    assert given["seq_lens"].tolist() == [start + count for start, count in zip(starts, counts, strict=True)]
    assert given["query_start"].diff().tolist() == list(counts)
    expected = [start + i for start, count in batch.sequences() for i in range(count)]
    assert given["positions"].tolist() == expected
    slots = given["slot_mapping"]
    assert len(set(slots.tolist())) == batch.num_tokens
    row = torch.arange(batch.num_seqs).repeat_interleave(given["query_start"].diff())
    assert torch.equal(slots // 16, given["block_tables"][row, given["positions"] // 16])
    assert torch.equal(slots % 16, given["positions"] % 16)


@pytest.mark.parametrize("batch", [DECODE, CACHED, MIXED])
def test_no_two_sequences_share_a_block(batch: Batch) -> None:
    tables = tensors(batch)["block_tables"]
    used = [row[: -(-sum(sequence) // 16)] for row, sequence in zip(tables, batch.sequences(), strict=True)]
    assert sorted(torch.cat(used).tolist()) == list(range(batch.num_blocks(16)))


def test_a_prompt_in_the_cache_and_the_rest_of_it_give_the_logits_of_the_whole(request_: CaptureRequest) -> None:
    """The inputs mean what they should."""
    module = request_.module
    whole, first, rest = (Batch(prompts=1, prompt_tokens=n, prompt_context=c) for n, c in ((40, 0), (32, 0), (8, 32)))
    with torch.inference_mode():
        expected = request_.call(module, batch_inputs(whole))
        tables = tensors(whole)["block_tables"]
        beginning = {**batch_inputs(first), "block_tables": tables[:, :2]}
        beginning["slot_mapping"] = tensors(whole)["slot_mapping"][:32]
        request_.call(module, beginning)
        end = {**batch_inputs(rest), "input_ids": torch.arange(32, 40)}
        assert torch.equal(tensors(rest)["block_tables"], tables)
        assert torch.allclose(request_.call(module, end), expected, atol=1e-5)


def test_logits_are_of_the_last_token_of_each_sequence(request_: CaptureRequest) -> None:
    with torch.inference_mode():
        assert request_.call(request_.module, batch_inputs(MIXED)).shape == (3, 1024)
    assert tensors(MIXED)["logits_indices"].tolist() == [0, 1, 10]


def test_figures_count_new_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    def time_in_turns(steps: list[Callable[[], object]], **options: object) -> list[StepTimes]:
        for step in steps:
            step()
        assert options == {"least_steps": 7, "least_seconds": 0.5, "warm_up": 2}
        return [StepTimes(median=0.5 * (1 + i), least=0.4, num_steps=9) for i in range(len(steps))]

    states = [torch.zeros(3, 16, 4) for _ in range(2)]
    models: list[Any] = [
        SimpleNamespace(make_states=ran.append, states={"a": state}, run=lambda inputs, i=i: ran.append((i, inputs)))
        for i, state in enumerate(states)
    ]
    monkeypatch.setattr(mla_layers, "time_in_turns", time_in_turns)
    first, second = measure(models, [MIXED], steps=7, seconds=0.5)
    assert [made["tok_s"] for made in (*first, *second)] == [22.0, 11.0]  # 11 tokens in half a second, and in one
    assert (first[0]["step_ms"], first[0]["steps"], first[0]["decode"]) == (500.0, 9, 2)
    assert ran[:2] == [{"blocks": MIXED.num_blocks(16)}] * 2
    assert [(i, inputs["num_decode_tokens"]) for i, inputs in ran[2:]] == [(0, 2), (1, 2)]
    assert states[0].std() > 0.5  # what is in the cache is something
    assert torch.equal(*states)


def test_the_cell_reads_batches_as_they_were_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(mla_layers, "open_bundle", lambda path: SimpleNamespace(plan=dict))
    monkeypatch.setattr(mla_layers.Plan, "from_json", lambda raw: raw)
    monkeypatch.setattr(mla_layers, "open_weights", lambda model, plan, random_seed: (model, random_seed))
    monkeypatch.setattr(mla_layers, "load", lambda opened, weights: seen.append(weights))
    monkeypatch.setattr(mla_layers, "measure", lambda models, batches, **options: seen.append((batches, options)))
    monkeypatch.setattr(mla_layers, "emit", seen.append)
    mla_layers.main([str(tmp_path), "b", "c", "--batches", '[{"decode": 2, "decode_context": 5}]'])
    assert seen[:2] == [(tmp_path, 0)] * 2
    assert seen[2] == ([Batch(decode=2, decode_context=5)], {"steps": 10, "seconds": 1.0})
