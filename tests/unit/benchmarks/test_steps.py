"""How calls are timed, and what torch's module runs; no compiler."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks.cells import torch_module
from benchmarks.common import steps
from benchmarks.common.models import RANDOM_MODELS
from benchmarks.common.steps import time_rounds, time_steps


def test_steps_are_timed_until_both_limits_are_reached() -> None:
    calls: list[int] = []
    (times,) = time_steps([lambda: calls.append(1)], least_steps=20, least_seconds=0.0)
    assert times.num_steps == 20
    assert len(calls) == 20 + 10
    assert 0 <= times.least <= times.median
    assert time_steps([lambda: None], least_steps=1, least_seconds=0.01)[0].num_steps > 1


def test_steps_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(steps.time, "perf_counter", lambda: now[0])
    calls: list[int] = []

    def step(number: int, seconds: float) -> None:
        calls.append(number)
        now[0] += seconds

    both = [lambda: step(0, 0.02), lambda: step(1, 0.2)]
    first, second = time_steps(both, least_steps=4, least_seconds=0.1, warm_up=1)
    assert calls == [0, 1, *[0, 0, 0, 1], *[1, 0, 0], *[1, 1]]
    assert (first.num_steps, second.num_steps) == (5, 4)
    assert [round(times.median, 3) for times in (first, second)] == [0.02, 0.2]


def test_timing_ends_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_MOST_STEPS", 7)
    assert time_steps([lambda: None], least_steps=50, least_seconds=9.0)[0].num_steps == 7
    monkeypatch.setattr(steps, "_MOST_SECONDS", 1e-9)
    assert time_steps([lambda: None], least_steps=50, least_seconds=9.0)[0].num_steps == 1


def test_rounds_leave_out_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now, took = [0.0], iter([9.0, 9.0, 1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(steps.time, "perf_counter", lambda: now[0])

    def way() -> None:
        now[0] += next(took)

    assert time_rounds({"a": way, "b": way}, rounds=2) == {"a": [1.0, 3.0], "b": [2.0, 4.0]}


@pytest.mark.parametrize("steps", [0, 3])
def test_figures_of_torch_alone(steps: int, tmp_path: Path) -> None:
    model = RANDOM_MODELS["llama-tiny"].write(tmp_path / "m", dtype="float32")
    prepared: list[torch.nn.Module] = []

    def prepare(module: torch.nn.Module) -> torch.nn.Module:
        prepared.append(module)
        return module

    args = argparse.Namespace(way="eager", model=model, max_tokens=32, batch=2, context=20, prompt_tokens=8)
    args.steps, args.seconds = steps, 0.0
    figures = torch_module.measure(args, compiled=prepare)
    assert len(prepared) == 1
    assert figures["first_s"] > 0
    assert figures.get("steps", 0) == steps
