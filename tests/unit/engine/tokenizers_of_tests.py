"""Small tokenizers of the kinds that models have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from piecework.engine.text.tokenizer import Tokenizer

EOS = 1


def byte_level(**settings: Any) -> Tokenizer:
    """Return a byte-level BPE tokenizer, where a character outside ASCII takes several tokens."""
    return Tokenizer(byte_level_library_tokenizer(), settings=settings)


def byte_level_library_tokenizer(*, vocab_size: int = 400) -> HuggingFaceTokenizer:
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        "the cat sat on the mat",
        '{"name": "value", "list": [1, 23, 456]}',
        "naïve café 漢字 漢 🙂🙂",
        "12-34 56.78",
    ]
    tokenizer.train_from_iterator(texts * 3, trainer)
    return tokenizer


def byte_fallback(**settings: Any) -> Tokenizer:
    """Return a tokenizer as Llama 2 has it: "▁" for spaces, and bytes for characters that it has no token for."""
    vocab: Mapping[str, int] = {"<unk>": 0, "</s>": 1, "▁": 2, "▁the": 3, "▁cat": 4, "a": 5, "t": 6, '{"': 7, '"}': 8}
    vocab = {**vocab, **{f"<0x{byte:02X}>": 9 + byte for byte in range(256)}}
    tokenizer = HuggingFaceTokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(tokenizer, settings=settings)


def metaspace(**settings: Any) -> Tokenizer:
    """Return a tokenizer of whole words and single letters that writes spaces as "▁"."""
    words = ["<unk>", "</s>", "▁Hello", "▁world", *'abcdefghijklmnopqrstuvwxyz0123456789-.,:{}[]"', "▁"]
    tokenizer = HuggingFaceTokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(tokenizer, settings=settings)
