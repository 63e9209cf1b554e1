"""Requests and sequences: what is refused, and when a sequence ends."""

from __future__ import annotations

import pytest

from piecework.engine.request import FinishReason, GenerationRequest, Sequence
from piecework.engine.sampling_params import SamplingParams
from piecework.errors import RequestError


def make_sequence(*, max_length: int, end_tokens: tuple[int, ...] = ()) -> Sequence:
    request = GenerationRequest("a", (1, 2), SamplingParams())
    return Sequence(request, 3, max_length=max_length, end_tokens=frozenset(end_tokens))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="at least one token"):
        GenerationRequest("a", (), SamplingParams())


def test_a_sequence_ends_at_its_length() -> None:
    sequence = make_sequence(max_length=4, end_tokens=(9,))
    assert (sequence.key, sequence.num_prompt, sequence.num_uncomputed) == (("a", 3), 2, 2)
    sequence.append(5)
    assert sequence.finish_reason is None
    sequence.append(6)
    assert sequence.finish_reason is FinishReason.LENGTH
    assert (sequence.tokens, sequence.generated) == ([1, 2, 5, 6], [5, 6])


def test_a_sequence_ends_at_an_end_token() -> None:
    sequence = make_sequence(max_length=3, end_tokens=(9,))
    sequence.append(9)
    assert sequence.finish_reason is FinishReason.STOP
