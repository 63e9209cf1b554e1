"""How texts become batches, whichever calls they come with; and what is refused before anything runs."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from piecework.engine.encoding.encode_engine import shortened
from piecework.engine.encoding.encoder import Encoder
from piecework.engine.text.tokenizer import TextTokens
from piecework.errors import EngineError, RequestError


class Sums:
    """A model whose vectors are (sum of the tokens, sum of the positions, sum of the types)."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may_run = threading.Event()
        self.may_run.set()
        self.began = threading.Event()
        self.fails = False

    def run(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        self.began.set()
        assert self.may_run.wait(10)
        if self.fails:
            raise RequestError(asked="run", found="a failure", try_="nothing")
        lengths = inputs["query_start"].diff().tolist()
        self.batches.append(lengths)
        parts = [inputs[name].split(lengths) for name in ("input_ids", "positions", "token_type_ids")]
        return [torch.tensor([[float(t.sum()) for t in text] for text in zip(*parts, strict=True)])]

    def close(self) -> None:
        pass


def text(*tokens: int) -> TextTokens:
    return TextTokens(tokens, [1] * len(tokens))


def make(model: Sums, *, padded: bool = False) -> Encoder:
    return Encoder(model, max_tokens=10, max_texts=3, longest=8, vocab_size=100, padded=padded)


def test_texts_are_computed_longest_first_in_batches_and_returned_in_their_order() -> None:
    model = Sums()
    texts = [text(*range(length)) for length in (1, 8, 2, 5, 1, 1, 2)]
    rows = make(model).encode(texts)
    wanted = [[sum(t.ids), sum(range(len(t.ids))), len(t.ids)] for t in texts]
    assert rows.tolist() == wanted
    assert model.batches == [[8], [5, 2, 2], [1, 1, 1]]


def test_texts_that_are_filled_up_count_as_long_as_the_longest() -> None:
    model = Sums()
    texts = [text(*range(length)) for length in (1, 8, 2, 5, 1, 1, 2, 3)]
    assert make(model, padded=True).encode(texts).shape == (8, 3)
    assert model.batches == [[8], [5, 3], [2, 2, 1], [1, 1]]


def test_calls_that_wait_are_computed_together() -> None:
    model = Sums()
    encoder = make(model)
    model.may_run.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(encoder.encode, [text(1)])
        assert model.began.wait(10)
        others = [pool.submit(encoder.encode, [text(n)]) for n in (2, 3, 4)]
        while encoder.stats().waiting < 3:
            pass
        model.may_run.set()
        assert [f.result(10)[0][0].item() for f in (first, *others)] == [1, 2, 3, 4]
    assert sorted(map(len, model.batches)) == [1, 3]
    assert (encoder.stats().steps, encoder.stats().prompt_tokens) == (2, 4)


def test_a_failure_is_told_and_the_next_call_runs() -> None:
    model = Sums()
    encoder = make(model)
    model.fails = True
    with pytest.raises(RequestError, match="a failure"):
        encoder.encode([text(1)])
    model.fails = False
    assert encoder.encode([text(7)])[0][0] == 7


@pytest.mark.parametrize("wrong", [[], [text()], [text(1), text(*range(9))], [text(100)], [text(-1)]])
def test_what_cannot_be_computed_is_refused_before_anything_runs(wrong: list[TextTokens]) -> None:
    model = Sums()
    with pytest.raises(RequestError):
        make(model).encode(wrong)
    assert not model.batches


def test_another_model_takes_over_and_a_closed_one_says_so() -> None:
    encoder, other = make(Sums()), Sums()
    encoder.swap_runner(other)
    encoder.encode([text(1)])
    assert other.batches == [[1]]
    encoder.close()
    with pytest.raises(EngineError, match="closed"):
        encoder.encode([text(1)])


def test_shortened_vectors_have_length_one_again() -> None:
    vectors = numpy.array([[3.0, 4.0, 12.0], [0.0, 0.0, 1.0]], dtype=numpy.float32)
    assert shortened(vectors, None) is vectors
    numpy.testing.assert_allclose(shortened(vectors, 2), [[0.6, 0.8], [0.0, 0.0]])
    with pytest.raises(RequestError, match="4 dimensions"):
        shortened(vectors, 4)
