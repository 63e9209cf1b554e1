"""The bytes that each token stands for, read off a tokenizer's own description."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenizers import Tokenizer as HuggingFaceTokenizer

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START: Final = "▁"


def token_bytes(tokenizer: HuggingFaceTokenizer, tokens: Sequence[int]) -> list[bytes]:
    """Return the bytes of each token, as they stand inside a text; b"" for a number that is no token.

    A token may hold part of a character only. Known are byte-level tokens, tokens for single bytes and "▁" for a space;
    the tokens of other kinds of tokenizers are what they decode to alone.
    """
    description = json.loads(tokenizer.to_str())
    decoders = _flatten(description.get("decoder"))
    kinds = {decoder["type"] for decoder in decoders}
    added = {entry["id"] for entry in description["added_tokens"]}
    table = _byte_level_table() if "ByteLevel" in kinds else {}
    spaces = "Metaspace" in kinds or any(_replaces_word_start(decoder) for decoder in decoders)
    return [
        _bytes_of(tokenizer, token, plain=token in added, table=table, single="ByteFallback" in kinds, spaces=spaces)
        for token in tokens
    ]


def _bytes_of(
    tokenizer: HuggingFaceTokenizer, token: int, *, plain: bool, table: Mapping[str, int], single: bool, spaces: bool
) -> bytes:
    written: str | None = tokenizer.id_to_token(token)
    if written is None or plain:
        return (written or "").encode()
    if table:
        return b"".join(bytes([table[char]]) if char in table else char.encode() for char in written)
    if single and (match := _BYTE_TOKEN.fullmatch(written)):
        return bytes([int(match[1], 16)])
    if spaces:
        return written.replace(_WORD_START, " ").encode()
    text: str = tokenizer.decode([token])
    return text.encode()


def _flatten(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [inner for one in decoder["decoders"] for inner in _flatten(one)]
    return [decoder]


def _replaces_word_start(decoder: Mapping[str, Any]) -> bool:
    return decoder["type"] == "Replace" and decoder.get("pattern") == {"String": _WORD_START}


def _byte_level_table() -> dict[str, int]:
    """Return which byte each character of a byte-level token stands for (GPT-2's encoding).

    Bytes that Latin-1 can print stand for themselves; the others, in order, for the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
