"""Texts as they come: stop strings at any border of tokens, held-back text, reasons to end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.engine.request import FinishReason
from piecework.engine.sampling.sampler import SampledToken
from piecework.engine.sampling_params import SamplingParams
from piecework.engine.text.deltas import OutputStream, TextDelta
from tests.unit.engine import tokenizers_of_tests as small

TOKENIZER = small.byte_level()
BYTES = {byte: [TOKENIZER.token_bytes(range(400)).index(bytes([byte]))] for byte in range(256)}


class Pieces:
    """Stands for a tokenizer: token i is the i-th piece of a text."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces = pieces

    def stream(self, prompt: Sequence[int]) -> Pieces:
        return self

    def add(self, token: int) -> str:
        return self._pieces[token]

    def finish(self) -> str:
        return ""


def run(pieces: Sequence[str], **params: Any) -> list[TextDelta]:
    """Return the deltas up to the end, with the last piece ending at the length."""
    stream = OutputStream(Pieces(pieces), SamplingParams(**params))  # type: ignore[arg-type]
    deltas = []
    for place in range(len(pieces)):
        last = FinishReason.LENGTH if place == len(pieces) - 1 else None
        deltas.append(stream.add(SampledToken(place), last))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def text_of(deltas: Sequence[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Return the text up to the first stop string to be complete, character by character."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


@st.composite
def split_texts(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    alphabet = draw(st.sampled_from(["ab", "aab", "abc", "añ漢🙂"]))
    text = draw(st.text(alphabet, min_size=1, max_size=40))
    stops = draw(st.lists(st.text(alphabet, min_size=1, max_size=6), max_size=4))
    borders = sorted(draw(st.sets(st.integers(0, len(text)), max_size=20)) | {0, len(text)})
    pieces = [text[start:end] for start, end in pairwise(borders)]
    empty = draw(st.lists(st.integers(0, len(pieces)), max_size=3))
    for place in empty:
        pieces.insert(place, "")  # a token that completes no character
    return pieces, stops


@settings(deadline=None, max_examples=500)
@given(case=split_texts())
def test_any_split_gives_the_text_that_cutting_the_whole_gives(case: tuple[list[str], list[str]]) -> None:
    pieces, stops = case
    deltas = run(pieces, stop=stops)
    text, stop = cut("".join(pieces), stops)
    assert text_of(deltas) == text
    assert deltas[-1].stop == stop
    assert deltas[-1].finish_reason is (FinishReason.LENGTH if stop is None else FinishReason.STOP)
    assert all(delta.finish_reason is None for delta in deltas[:-1])


@settings(deadline=None)
@given(case=split_texts())
def test_no_more_is_held_back_than_needed(case: tuple[list[str], list[str]]) -> None:
    pieces, stops = case
    given_out, seen = "", ""
    for piece, delta in zip(pieces, run(pieces, stop=stops), strict=False):
        given_out, seen = given_out + delta.text, seen + piece
        held = seen[len(given_out) :]
        if held and delta.finish_reason is None:
            assert any(stop.startswith(held) for stop in stops)


@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30), stop=st.text(max_size=3))
def test_real_tokens_with_characters_of_many_bytes(text: str, stop: str) -> None:
    stops = [stop] if stop and "\ufffd" not in stop else []
    stream, found = OutputStream(TOKENIZER, SamplingParams(stop=stops)), []
    for token in TOKENIZER.encode(text):
        found.append(stream.add(SampledToken(token)))
        if found[-1].finish_reason is not None:
            break
    else:
        found.append(stream.finish(FinishReason.ABORT))
    assert text_of(found) == cut(text, stops)[0]


def test_text_that_may_start_a_stop_string_comes_later() -> None:
    deltas = run(["x <", "/", "b", " <", "/s", "> y"], stop="</s>")
    assert [delta.text for delta in deltas] == ["x ", "", "</b", " ", "", ""]
    assert deltas[-1].stop == "</s>"


def test_of_stop_strings_complete_at_one_character_the_longest_counts() -> None:
    assert text_of(run(["abc"], stop=["c", "bc"])) == "a"
    assert text_of(run(["a", "bcd"], stop=["bcd", "c"])) == "ab"


@pytest.mark.parametrize(
    ("min_tokens", "text"), [(0, ""), (1, "x-"), (2, "x-x-"), (3, "x-x-"), (4, "x-x-xx"), (5, "x-x-xxx")]
)
def test_min_tokens_complete_no_stop_string(min_tokens: int, text: str) -> None:
    assert text_of(run(["x", "-x", "-", "xx", "x"], stop=["x"], min_tokens=min_tokens)) == text


def test_a_stop_string_may_begin_in_the_min_tokens() -> None:
    assert text_of(run(["1st", "o", "p2"], stop="stop", min_tokens=2)) == "1"


def test_the_token_that_ends_it_gives_no_text_but_what_was_held() -> None:
    stream = OutputStream(TOKENIZER, SamplingParams(stop="cats", stop_token_ids=TOKENIZER.encode(".")))
    tokens = TOKENIZER.encode("the cat")
    text = text_of([stream.add(SampledToken(token)) for token in tokens])
    stop = TOKENIZER.encode(".")[0]
    delta = stream.add(SampledToken(stop), FinishReason.STOP)
    assert text + delta.text == "the cat"
    assert (delta.finish_reason, delta.stop) == (FinishReason.STOP, stop)
    assert delta.tokens == (SampledToken(stop),)


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.STOP])
def test_an_end_inside_a_character_gives_the_characters_before_it(reason: FinishReason) -> None:
    stream = OutputStream(TOKENIZER, SamplingParams(stop="a 🙂"))
    tokens = [token for byte in "a 🙂".encode() for token in BYTES[byte]][:-1]
    if reason is FinishReason.STOP:
        tokens.append(small.EOS)
    found = [stream.add(SampledToken(token)) for token in tokens[:-1]]
    found.append(stream.add(SampledToken(tokens[-1]), reason))
    assert (text_of(found), found[-1].finish_reason) == ("a ", reason)


def test_logprobs_go_with_their_token() -> None:
    stream = OutputStream(TOKENIZER, SamplingParams(stop="zz", logprobs=1))
    token = SampledToken(TOKENIZER.encode("z")[0], -0.5, ((3, -0.1),))
    delta = stream.add(token)
    assert delta == TextDelta("", (token,))
    assert stream.finish(FinishReason.ABORT) == TextDelta("z", (), FinishReason.ABORT)


def test_a_stop_string_beats_the_length() -> None:
    assert run(["a", "b"], stop="b")[-1] == TextDelta("", (SampledToken(1),), FinishReason.STOP, "b")
