"""What batches are, and that their inputs mean what they should; no compiler."""

import pytest
import torch
from torch import Tensor

from benchmarks.cells.torch_module import build_module
from benchmarks.common.models import RANDOM_MODELS
from piecework.capture.request import CaptureRequest
from piecework.models.sample_batches import Batch, batch_inputs

DECODE = Batch(decode=3, decode_context=37)
FRESH = Batch(prompts=2, prompt_tokens=20)
CACHED = Batch(prompts=2, prompt_tokens=5, prompt_context=32)
MIXED = Batch(decode=2, decode_context=16, prompts=1, prompt_tokens=9)


def tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch_inputs(batch, scattered=True).items() if isinstance(value, Tensor)}


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
    assert sorted(torch.cat(used).tolist()) == list(range(batch.num_blocks))


def test_a_prompt_in_the_cache_and_the_rest_of_it_give_the_logits_of_the_whole(request_: CaptureRequest) -> None:
    """The inputs mean what they should."""
    module = request_.module
    whole, first, rest = (Batch(prompts=1, prompt_tokens=n, prompt_context=c) for n, c in ((40, 0), (32, 0), (8, 32)))
    with torch.inference_mode():
        expected = request_.call(module, batch_inputs(whole, scattered=True))
        tables = tensors(whole)["block_tables"]
        beginning = {**batch_inputs(first, scattered=True), "block_tables": tables[:, :2]}
        beginning["slot_mapping"] = tensors(whole)["slot_mapping"][:32]
        request_.call(module, beginning)
        end = {**batch_inputs(rest, scattered=True), "input_ids": torch.arange(32, 40)}
        assert torch.equal(tensors(rest)["block_tables"], tables)
        assert torch.allclose(request_.call(module, end), expected, atol=1e-5)


def test_logits_are_of_the_last_token_of_each_sequence(request_: CaptureRequest) -> None:
    with torch.inference_mode():
        assert request_.call(request_.module, batch_inputs(MIXED)).shape == (3, 1024)
    assert tensors(MIXED)["logits_indices"].tolist() == [0, 1, 10]


def test_blocks_lie_one_after_the_other_unless_scattered() -> None:
    tables = batch_inputs(DECODE)["block_tables"]
    assert isinstance(tables, Tensor)
    assert tables.flatten().tolist() == list(range(DECODE.num_blocks))
    assert not torch.equal(tables, tensors(DECODE)["block_tables"])
