"""What a cell does, in this process: no compiler runs here."""

from pathlib import Path

import pytest
import torch

from piecework.bench.cells import forward
from piecework.bench.cells.forward import CONTEXT, decode_inputs, num_blocks, prefill_inputs, time_in_turns, time_steps
from piecework.bench.cells.module import build_module, first_step_and_times
from piecework.bench.synthetic import ModelShape, write_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = ModelShape(hidden=32, heads=2, intermediate=48, vocab=300)
    return write_llama(tmp_path_factory.mktemp("models") / "m", shape=shape, layers=2, dtype="float32")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decode_step_has_one_token_per_sequence(batch: int) -> None:
    inputs = decode_inputs(batch)
    tables = inputs["block_tables"]
    assert isinstance(tables, torch.Tensor)
    assert sorted(tables.flatten().tolist()) == list(range(num_blocks(batch)))
    assert tables.shape[1] * 16 == CONTEXT
    assert inputs["num_decode_tokens"] == batch
    slots = inputs["slot_mapping"]
    assert isinstance(slots, torch.Tensor)
    assert slots.tolist() == [64 * (sequence + 1) - 1 for sequence in range(batch)]


def test_decoding_goes_on_where_a_prompt_ended(model: Path) -> None:
    """The inputs mean what they should: a prompt and a step give the logits of the longer prompt."""
    request = build_module(model, max_tokens=32, blocks=4)
    with torch.inference_mode():
        whole = request.call(request.module, prefill_inputs(9))
        request.call(request.module, prefill_inputs(8))
        step = {**decode_inputs(1), "input_ids": torch.tensor([8]), "positions": torch.tensor([8])}
        step |= {"slot_mapping": torch.tensor([8]), "seq_lens": torch.tensor([9])}
        assert torch.allclose(request.call(request.module, step), whole, atol=1e-5)


def test_every_sequence_of_a_batch_is_the_same_step(model: Path) -> None:
    request = build_module(model, max_tokens=32, blocks=num_blocks(3))
    with torch.inference_mode():
        batch = decode_inputs(3)
        logits = request.call(request.module, {**batch, "input_ids": torch.tensor([5, 5, 5])})
    assert logits.shape == (3, 300)
    assert torch.allclose(logits[0], logits[2], atol=1e-6)


def test_steps_are_timed_until_both_limits_are_reached() -> None:
    calls: list[int] = []
    times = time_steps(lambda: calls.append(1), least_steps=20, least_seconds=0.0)
    assert times.num_steps == 20
    assert len(calls) == 20 + 10
    assert 0 <= times.least <= times.median
    assert time_steps(lambda: None, least_steps=1, least_seconds=0.01).num_steps > 1


def test_steps_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(forward.time, "perf_counter", lambda: now[0])
    calls: list[int] = []

    def step(number: int, seconds: float) -> None:
        calls.append(number)
        now[0] += seconds

    both = [lambda: step(0, 0.02), lambda: step(1, 0.2)]
    first, second = time_in_turns(both, least_steps=4, least_seconds=0.1, warm_up=1)
    assert calls == [0, 1, *[0, 0, 0, 1], *[1, 0, 0], *[1, 1]]
    assert (first.num_steps, second.num_steps) == (5, 4)
    assert [round(times.median, 3) for times in (first, second)] == [0.02, 0.2]


def test_timing_ends_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_MOST_STEPS", 7)
    assert time_steps(lambda: None, least_steps=50, least_seconds=9.0).num_steps == 7
    monkeypatch.setattr(forward, "_MOST_SECONDS", 1e-9)
    assert time_steps(lambda: None, least_steps=50, least_seconds=9.0).num_steps == 1


@pytest.mark.parametrize("steps", [0, 3])
def test_figures_of_a_peer(model: Path, steps: int) -> None:
    prepared: list[torch.nn.Module] = []

    def prepare(module: torch.nn.Module) -> torch.nn.Module:
        prepared.append(module)
        return module

    figures = first_step_and_times(model, max_tokens=32, batch=2, steps=steps, seconds=0.0, prepare=prepare)
    assert len(prepared) == 1
    assert figures["first_step_s"] > 0
    assert ("step_ms" in figures) == bool(steps)
    assert figures.get("steps", 0) == steps
