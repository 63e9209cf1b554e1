"""How texts become tokens for an encoder: prompts, small letters, and what is cut off."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from piecework.engine.encoding.encode_engine import EncodeEngine
from piecework.engine.encoding.encoder import Encoder
from piecework.engine.text.tokenizer import load_tokenizer
from piecework.errors import RequestError
from piecework.spec.encoder_config import EncoderConfig
from tests.unit.models.encoders import write_plain


def engine(directory: Path, **fields: object) -> EncodeEngine:
    config = EncoderConfig(scores=False, poolings=("mean",), **fields)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(write_plain(directory), longest=6)
    return EncodeEngine(cast("Encoder", None), tokenizer, config)  # which none of this reaches


def test_texts_are_cut_off_and_not_padded(tmp_path: Path) -> None:
    short, long = engine(tmp_path).tokens(["ab", "abcdefgh"])
    assert (short.ids, short.cut) == ([1, 4, 5, 2], False)
    assert (long.ids, long.cut) == ([1, 4, 5, 6, 7, 2], True)


def test_prompts_come_before_texts(tmp_path: Path) -> None:
    made = engine(tmp_path, prompts={"query": "q", "plain": ""}, default_prompt="query")
    given = [made.tokens(["a"], **how)[0].ids for how in ({}, {"prompt_name": "plain"}, {"prompt": "x"})]
    assert given == [[1, 20, 4, 2], [1, 4, 2], [1, 27, 4, 2]]
    with pytest.raises(RequestError, match="query, plain"):
        made.tokens(["a"], prompt_name="other")


def test_small_letters_where_the_directory_says_so(tmp_path: Path) -> None:
    assert engine(tmp_path).tokens(["A"])[0].ids == [1, 3, 2]
    assert engine(tmp_path, lower_case=True).tokens(["A"])[0].ids == [1, 4, 2]
    assert engine(tmp_path, lower_case=True).pair_tokens([("A", "B")])[0].ids == [1, 4, 2, 5, 2]
