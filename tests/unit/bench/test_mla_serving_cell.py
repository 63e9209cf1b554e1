"""The cell that sends chats through the engine, with a stand-in for the model."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from piecework.bench.cells import mla_serving
from piecework.bench.cells.mla_serving import main, send_all
from piecework.bench.serving.workload import draw_chats


class Recorded:
    """Answers every request token by token, and lets others in between."""

    def __init__(self, *, missing: int = 0) -> None:
        self.sent: list[tuple[list[int], Any]] = []
        self.order: list[int] = []
        self._missing = missing

    async def stream(self, prompt: list[int], params: Any) -> AsyncIterator[str]:
        self.sent.append((prompt, params))
        number = len(self.sent)
        for _ in range(params.max_tokens - self._missing):
            self.order.append(number)
            await asyncio.sleep(0)
            yield "token"

    def __enter__(self) -> "Recorded":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stats(self) -> Any:
        return SimpleNamespace(steps=12, preemptions=1)


def test_all_are_sent_at_once_and_every_token_has_its_time() -> None:
    llm = Recorded()
    outcomes = asyncio.run(send_all(llm, [([1, 2, 3], 2), ([4], 3)]))  # type: ignore[arg-type]
    assert llm.order[:2] == [1, 2]
    assert [(o.input_tokens, o.output_tokens, len(o.token_s)) for o in outcomes] == [(3, 2, 2), (1, 3, 3)]
    for outcome in outcomes:
        assert not outcome.error
        assert list(outcome.token_s) == sorted(outcome.token_s)
        assert outcome.latency_s == outcome.token_s[-1]
    assert {(p.temperature, p.ignore_eos) for _, p in llm.sent} == {(0.0, True)}


def test_a_token_that_is_missing_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="1 tokens instead of 2"):
        asyncio.run(send_all(Recorded(missing=1), [([1], 2)]))  # type: ignore[arg-type]


def test_lengths_are_those_of_chats_and_always_the_same() -> None:
    made = draw_chats(200, input=100, output=50, max_length=256, vocab=1000, seed=0)
    assert made == draw_chats(200, input=100, output=50, max_length=256, vocab=1000, seed=0)
    inputs = sorted(len(prompt) for prompt, _ in made)
    assert inputs[100] < 70 < sum(inputs) / 200  # many short ones, and few long ones
    assert all(len(prompt) + output <= 256 for prompt, output in made)


def test_figures_leave_out_what_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, printed, given = Recorded(), [], []

    def make(model: object, **options: object) -> Recorded:
        given.append(options)
        return llm

    monkeypatch.setattr(mla_serving, "LLM", make)
    monkeypatch.setattr(mla_serving, "read_config", lambda path: SimpleNamespace(vocab_size=500))
    monkeypatch.setattr(mla_serving, "emit", printed.append)
    main(["model", "--bundle", "b", "--requests", "10", "--input", "8", "--output", "6", "--max-length", "64"])
    (figures,) = printed
    assert len(llm.sent) == 8 + 10
    assert [prompt for prompt, _ in llm.sent[:8]] == [prompt for prompt, _ in llm.sent[8:16]]
    measured = llm.sent[8:]
    assert figures["completed"] == 10
    assert figures["total_input_tokens"] == sum(len(prompt) for prompt, _ in measured)
    assert figures["total_output_tokens"] == sum(params.max_tokens for _, params in measured)
    assert (figures["steps"], figures["preemptions"]) == (12, 1)
    assert given[0]["prefix_caching"] is False
