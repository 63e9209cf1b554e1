"""Tokenizer, streaming detokenizer and chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers

from piecework.engine.text.tokenizer import Tokenizer, load_tokenizer
from piecework.errors import RequestError, UnsupportedModelError
from tests.unit.engine import tokenizers_of_tests as small

KINDS = [small.byte_level(), small.byte_fallback(), small.metaspace()]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Return a directory with a byte-level tokenizer whose every character outside ASCII takes several tokens."""
    small.byte_level_library_tokenizer(vocab_size=300).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("text", ["the cat", " naïve café", "漢字 🙂🙃 x", "👩‍👩‍👧", "\n\t  spaces  "])
def test_streaming_gives_the_same_text_in_whole_characters(model_dir: Path, text: str) -> None:
    tokenizer = load_tokenizer(model_dir)
    tokens = tokenizer.encode(text)
    stream = tokenizer.stream()
    chunks = [stream.add(token) for token in tokens]
    assert "".join(chunks) == text == tokenizer.decode(tokens)
    assert not any("�" in chunk for chunk in chunks)


@pytest.mark.parametrize("text", ["ok 🙂", "漢漢", "🙂🙂"])
def test_a_text_cut_inside_a_character_stops_before_it(text: str) -> None:
    tokenizer = small.byte_level()
    tokens = tokenizer.encode(text)[:-1]
    stream = tokenizer.stream()
    found = "".join(stream.add(token) for token in tokens) + stream.finish()
    assert found == b"".join(tokenizer.token_bytes(tokens)).decode(errors="ignore")
    assert stream.finish() == stream.finish()


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


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=40), prompt=st.text(st.characters(codec="utf-8"), max_size=9)
)
def test_what_comes_token_by_token_is_the_decoded_text(text: str, prompt: str) -> None:
    tokenizer = small.byte_level()
    tokens = tokenizer.encode(text)
    stream = tokenizer.stream(tokenizer.encode(prompt))
    found = "".join(stream.add(token) for token in tokens)
    assert found + stream.finish() == text.rstrip("�")


@settings(deadline=None, max_examples=200)
@given(tokens=st.lists(st.integers(0, 399), max_size=20), tokenizer=st.sampled_from(KINDS))
def test_any_tokens_give_the_decoded_text(tokens: list[int], tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    found = "".join(stream.add(token) for token in tokens) + stream.finish()
    expected = tokenizer.decode(tokens)
    # bytes next to an invalid one become "�" as well in some decoders, when they were given out already
    assert found == expected.rstrip("�") or ("�" in expected and tokenizer is not KINDS[0])


@settings(deadline=None)
@given(text=st.text("aé漢🙂 ", min_size=1, max_size=12), data=st.data())
def test_a_prompt_may_end_inside_a_character(text: str, data: st.DataObject) -> None:
    tokenizer = small.byte_level()
    tokens = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(tokens)))
    stream = tokenizer.stream(tokens[:cut])
    shown = tokenizer.decode(tokens[:cut]).rstrip("�")
    assert shown + "".join(stream.add(token) for token in tokens[cut:]) == text


@pytest.mark.parametrize("tokenizer", KINDS)
def test_the_bytes_of_tokens_make_up_the_text(tokenizer: Tokenizer) -> None:
    text = " the cat 漢" if tokenizer.encode("漢")[0] != 0 else " Hello world"
    tokens = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(tokens)).decode().strip() == text.strip()
    assert tokenizer.token_bytes([small.EOS, 99999]) == [b"</s>", b""]
    assert small.EOS in tokenizer.special_token_ids


def test_every_byte_has_a_token() -> None:
    tokenizer = small.byte_level()
    single = {value for value in tokenizer.token_bytes(range(tokenizer.num_tokens)) if len(value) == 1}
    assert single == {bytes([byte]) for byte in range(256)}


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
