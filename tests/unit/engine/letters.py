"""A tokenizer whose 40 tokens are letters, for the engine's model of tests."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers

from tests.unit.engine.paged_model import EOS, VOCAB

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"[: VOCAB - 1]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}{{ tools[0].function.name }}{% endif %}"


def write_letters(directory: Path, *, num_letters: int = len(LETTERS)) -> None:
    """Write tokenizer.json and tokenizer_config.json; token EOS is "</s>"."""
    names = [*LETTERS[:EOS], "</s>", *LETTERS[EOS:num_letters]]
    tokenizer = HuggingFaceTokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "</s>"}))
