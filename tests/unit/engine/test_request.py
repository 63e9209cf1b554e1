"""Sampling parameters and requests: what is refused, and when a sequence ends."""

from __future__ import annotations

from typing import Any

import pytest

from piecework.engine.request import FinishReason, GenerationRequest, SamplingParams, Sequence
from piecework.errors import RequestError


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"seed": 2**63},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="at least one token"):
        GenerationRequest(0, (), SamplingParams())


def test_a_sequence_ends_at_a_stop_token_or_its_length() -> None:
    sequence = Sequence(GenerationRequest(0, (1, 2), SamplingParams()), max_length=4)
    sequence.append(5, stop_token_ids=(9,))
    assert sequence.finish_reason is None
    sequence.append(6, stop_token_ids=(9,))
    assert sequence.finish_reason is FinishReason.LENGTH
    other = Sequence(GenerationRequest(0, (1, 2), SamplingParams()), max_length=4)
    other.append(9, stop_token_ids=(9,))
    assert other.finish_reason is FinishReason.STOP
