"""Texts as they come: stop strings at any border of tokens, held-back text, reasons to end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models

from piecework.engine.output import SampledToken, TokenOutput
from piecework.engine.request import FinishReason, GenerationRequest
from piecework.engine.sampling_params import SamplingParams
from piecework.engine.text.deltas import OutputStream, RequestTexts, TextDelta
from piecework.engine.text.tokenizer import Tokenizer
from tests.unit.engine import tokenizers_of_tests as small

TOKENIZER = small.byte_level()
BYTES = {byte: [TOKENIZER.token_bytes(range(400)).index(bytes([byte]))] for byte in range(256)}


NOTHING = small.EOS
"""A token without text."""


def pieces_tokenizer(pieces: Sequence[str]) -> tuple[Tokenizer, list[int]]:
    """Return a tokenizer that has each piece of a text as a token, and their tokens; "" is that of a special token."""
    vocab = {"<none>": 0, "</s>": NOTHING} | {
        piece: i for i, piece in enumerate(dict.fromkeys(filter(None, pieces)), 2)
    }
    tokenizer = HuggingFaceTokenizer(models.WordLevel(vocab, unk_token="<none>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<none>", "</s>"])
    return Tokenizer(tokenizer, settings={}), [vocab[piece] if piece else NOTHING for piece in pieces]


def output(token: int | SampledToken, finish_reason: FinishReason | None = None) -> TokenOutput:
    sampled = token if isinstance(token, SampledToken) else SampledToken(token)
    return TokenOutput("r", 0, sampled, finish_reason)


def add_all(stream: OutputStream, tokens: Sequence[int], reason: FinishReason | None) -> list[TextDelta]:
    """Return the deltas up to the end, with `reason` for the last token."""
    deltas: list[TextDelta] = []
    for place, token in enumerate(tokens):
        if stream.ended:
            break
        deltas.append(stream.add(output(token, reason if place == len(tokens) - 1 else None)))
    return deltas


def run(pieces: Sequence[str], **params: Any) -> list[TextDelta]:
    """Return the deltas of a text in pieces, the last of which ends it at its length."""
    tokenizer, tokens = pieces_tokenizer(pieces)
    return add_all(OutputStream(tokenizer, SamplingParams(**params)), tokens, FinishReason.LENGTH)


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
def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string(case: tuple[list[str], list[str]]) -> None:
    pieces, stops = case
    given_out, seen = "", ""
    *before, last = run(pieces, stop=stops)
    for piece, delta in zip(pieces, before, strict=False):
        given_out, seen = given_out + delta.text, seen + piece
        begun = [seen[at:] for at in range(len(seen)) if any(stop.startswith(seen[at:]) for stop in stops)]
        assert seen[len(given_out) :] == max(begun, key=len, default="")
    assert last.finish_reason is not None


@settings(deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), min_size=1, max_size=30),
    stop=st.text(max_size=3),
)
def test_real_tokens_with_characters_of_many_bytes(text: str, stop: str) -> None:
    stops = [stop] if stop and "\ufffd" not in stop else []
    stream = OutputStream(TOKENIZER, SamplingParams(stop=stops))
    found = add_all(stream, TOKENIZER.encode(text), FinishReason.LENGTH)
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
    stop = TOKENIZER.encode(".")[0]
    *before, delta = add_all(stream, [*TOKENIZER.encode("the cat"), stop], FinishReason.STOP)
    assert text_of(before) == "the "
    assert delta == TextDelta("cat", (SampledToken(stop),), FinishReason.STOP, stop)


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.STOP])
def test_an_end_inside_a_character_gives_the_characters_before_it(reason: FinishReason) -> None:
    stream = OutputStream(TOKENIZER, SamplingParams(stop="a 🙂"))
    tokens = [token for byte in "a 🙂".encode() for token in BYTES[byte]][:-1]
    if reason is FinishReason.STOP:
        tokens.append(small.EOS)
    found = add_all(stream, tokens, reason)
    assert (text_of(found), found[-1].finish_reason) == ("a ", reason)


def test_what_the_engine_says_of_a_token_goes_with_its_delta() -> None:
    stream = OutputStream(TOKENIZER, SamplingParams(stop="zz", logprobs=1))
    token = SampledToken(TOKENIZER.encode("z")[0], -0.5, ((3, -0.1),))
    first = TokenOutput("r", 2, token, num_cached=4, prompt_logprobs=(None, token))
    assert stream.add(first) == TextDelta("", (token,), index=2, num_cached=4, prompt_logprobs=(None, token))
    assert not stream.ended


def test_a_stop_string_beats_the_length() -> None:
    last = run(["a", "b"], stop="b")[-1]
    assert (last.text, last.finish_reason, last.stop) == ("", FinishReason.STOP, "b")


def test_without_a_tokenizer_there_is_no_text() -> None:
    found = add_all(OutputStream(None, SamplingParams()), [5, 6], FinishReason.LENGTH)
    assert found == [TextDelta("", (SampledToken(5),)), TextDelta("", (SampledToken(6),), FinishReason.LENGTH)]


def test_tokens_that_come_after_a_stop_string_are_dropped_and_the_others_go_on() -> None:
    tokenizer, (a, b) = pieces_tokenizer(["a", "b"])
    texts = RequestTexts(GenerationRequest("r", (a,), SamplingParams(n=2, stop="b")), tokenizer)
    assert texts.add(TokenOutput("r", 0, SampledToken(b))).finish_reason is FinishReason.STOP
    assert texts.add(TokenOutput("r", 0, SampledToken(a))) is None
    assert not texts.ended
    assert texts.add(TokenOutput("r", 1, SampledToken(a), FinishReason.LENGTH)).text == "a"
    assert texts.ended
