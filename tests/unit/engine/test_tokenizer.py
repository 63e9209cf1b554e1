"""Tokenizer, streaming detokenizer and chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from piecework.engine.tokenizer import load_tokenizer
from piecework.errors import RequestError, UnsupportedModelError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Return a directory with a byte-level tokenizer whose every character outside ASCII takes several tokens."""
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "a statement for the loop"], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("text", ["the cat", " naïve café", "漢字 🙂🙃 x", "👩‍👩‍👧", "\n\t  spaces  "])
def test_streaming_gives_the_same_text_in_whole_characters(model_dir: Path, text: str) -> None:
    tokenizer = load_tokenizer(model_dir)
    tokens = tokenizer.encode(text)
    stream = tokenizer.stream()
    chunks = [stream.add(token) for token in tokens]
    assert "".join(chunks) == text == tokenizer.decode(tokens)
    assert not any("�" in chunk for chunk in chunks)


def test_a_text_cut_inside_a_character_stops_before_it(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    stream = tokenizer.stream()
    assert "".join(stream.add(token) for token in tokenizer.encode("ok 🙂")[:-1]) == "ok "


def test_special_tokens_are_not_shown(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    stream = tokenizer.stream()
    assert "".join(stream.add(token) for token in [0, *tokenizer.encode("the cat"), 1]) == "the cat"


def test_the_first_word_keeps_its_space_after_a_prompt(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(models.WordLevel({"▁Hello": 0, "▁world": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.stream([0]).add(1) == " world"
    assert loaded.stream().add(1) == "world"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "list"])
def test_chat_templates(model_dir: Path, place: str) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    settings: dict[str, object] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    if place == "chat_template.jinja":
        (model_dir / place).write_text(template)
    elif place == "list":
        settings["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
    else:
        settings["chat_template"] = template
    (model_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(model_dir)
    text = tokenizer.render_chat(MESSAGES)
    assert text == '<s><user>"hi"</s><assistant>"hello"</s><assistant>'
    tokens = tokenizer.encode_chat(MESSAGES)
    assert tokens[0] == 0
    assert tokens.count(1) == 2


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for x in", "template fails"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_templates_that_fail_or_reach_too_far_are_refused(model_dir: Path, template: str, found: str) -> None:
    (model_dir / "chat_template.jinja").write_text(template)
    with pytest.raises(RequestError, match=found):
        load_tokenizer(model_dir).render_chat(MESSAGES)


def test_a_model_without_template_is_refused(model_dir: Path) -> None:
    with pytest.raises(RequestError, match=r"chat_template\.jinja"):
        load_tokenizer(model_dir).encode_chat(MESSAGES)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_missing_or_broken_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_broken_settings_are_refused(model_dir: Path) -> None:
    (model_dir / "tokenizer_config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer_config\.json"):
        load_tokenizer(model_dir)
