"""The cell that generates offline, with a stand-in for the model."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from piecework.bench.cells import throughput
from piecework.bench.cells.throughput import PromptDraw, generate, measure


class Recorded:
    """Continues everything with zeros, and takes the seconds that it is told to."""

    def __init__(self, seconds: list[float], clock: list[float]) -> None:
        self.prompts: list[list[list[int]]] = []
        self.params: list[Any] = []
        self._seconds, self._clock = seconds, clock

    def generate(self, prompts: list[list[int]], params: Any) -> list[Any]:
        self._clock[0] += self._seconds[len(self.prompts)]
        self.prompts.append(prompts)
        self.params.append(params)
        return [SimpleNamespace(tokens=[0] * params.max_tokens) for _ in prompts]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_figures_leave_out_what_warms_up_and_are_those_of_the_median_run(clock: list[float]) -> None:
    llm = Recorded([99.0, 2.0, 1.0, 4.0, 50.0, 0.5], clock)
    found = measure(llm, PromptDraw(vocab_size=1000, num_tokens=6), requests=4, output=8, runs=3)
    assert found == {
        "out_tok_s": 16.0,
        "out_tok_s_all": [16.0, 32.0, 8.0],
        "total_tok_s": 28.0,
        "one_request_tok_s": 16.0,
    }
    assert [len(prompts) for prompts in llm.prompts] == [4, 4, 4, 4, 1, 1]
    assert llm.prompts[4] == llm.prompts[5]
    assert len({str(prompts) for prompts in llm.prompts[:5]}) == 5
    assert {(p.temperature, p.max_tokens, p.ignore_eos) for p in llm.params} == {(0.0, 8, True)}


def test_prompts_are_those_that_the_script_beside_it_draws() -> None:
    theirs = random.Random(0)
    expected = [[theirs.randrange(300, 32000) for _ in range(5)] for _ in range(6)]
    draw = PromptDraw(vocab_size=32000, num_tokens=5)
    assert draw.draw(3) + draw.draw(3) == expected


def test_a_small_vocabulary() -> None:
    (prompt,) = PromptDraw(vocab_size=131, num_tokens=500).draw(1)
    assert (min(prompt), max(prompt)) == (65, 130)


def test_a_continuation_that_is_too_short_is_no_figure() -> None:
    llm: Any = SimpleNamespace(generate=lambda prompts, params: [SimpleNamespace(tokens=[1])])
    with pytest.raises(AssertionError, match="instead of 8"):
        generate(llm, [[1]], output=8)
