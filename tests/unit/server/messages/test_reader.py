"""How each family's text is read, whole and cut anywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest

from piecework.errors import RequestError
from piecework.server.messages.dialect import Kind, find_dialect, known_dialects
from piecework.server.messages.reader import MessageReader, Part

WEATHER = ("weather", {"city": "Oslo"})
TIME = ("time", {"zone": "UTC", "at": ["now", "}]"]})
CASES: list[tuple[str, str, dict[Kind, str], list[tuple[str, Any]]]] = [
    ("hermes", "Hello <b>you</b>", {Kind.CONTENT: "Hello <b>you</b>"}, []),
    (
        "hermes",
        "<think>\nHm.\n</think>\n\nI look.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {"zone": "UTC", "at": ["now", "}]"]}}\n</tool_call>',
        {Kind.REASONING: "Hm.\n", Kind.CONTENT: "I look.\n"},
        [WEATHER, TIME],
    ),
    ("hermes", "<tool_call>no call</tool_call>.", {Kind.CONTENT: "<tool_call>no call</tool_call>."}, []),
    ("hermes", '<tool_call>{"name": "weather", "argu', {Kind.CONTENT: '<tool_call>{"name": "weather", "argu'}, []),
    ("llama3", '{"name": "weather", "parameters": {"city": "Oslo"}}', {}, [WEATHER]),
    (
        "llama3",
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}; '
        '{"name": "time", "parameters": {"zone": "UTC", "at": ["now", "}]"]}}',
        {},
        [WEATHER, TIME],
    ),
    ("llama3", '{"answer": 42}', {Kind.CONTENT: '{"answer": 42}'}, []),
    ("llama3", "The set {1, 2}", {Kind.CONTENT: "The set {1, 2}"}, []),
    ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]', {}, [WEATHER]),
    (
        "mistral",
        'One.[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]time{"zone": "UTC", "at": ["now", "}]"]}',
        {Kind.CONTENT: "One."},
        [WEATHER, TIME],
    ),
    (
        "deepseek",
        "Hm.</think>Yes<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Oslo"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>time<｜tool▁sep｜>'
        '{"zone": "UTC", "at": ["now", "}]"]}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        {Kind.REASONING: "Hm.", Kind.CONTENT: "Yes"},
        [WEATHER, TIME],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
        "<|end|><|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json<|message|>"
        '{"city": "Oslo"}<|call|>',
        {Kind.REASONING: "Hm.", Kind.CONTENT: "I look."},
        [WEATHER],
    ),
    (
        "harmony",
        '<|channel|>commentary to=functions.weather json<|message|>{"city": "Oslo"}',
        {},
        [WEATHER],
    ),
    ("harmony", "<|channel|>final<|message|>Yes.", {Kind.CONTENT: "Yes."}, []),
    ("think", "<think>a</think>b <tool_call>", {Kind.REASONING: "a", Kind.CONTENT: "b <tool_call>"}, []),
]


def read(name: str, pieces: list[str]) -> list[Part]:
    (dialect,) = known_dialects(name)
    opened = dialect.reasoning if name == "deepseek" else None
    reader = MessageReader(dialect, calls=True, opened=opened)
    parts = [part for piece in pieces for part in reader.read(piece, is_last=False)]
    return parts + reader.read("", is_last=True)


def summary(parts: list[Part]) -> tuple[dict[Kind, str], list[tuple[str, Any]]]:
    texts: dict[Kind, str] = {}
    calls: list[tuple[str, Any]] = []
    for part in parts:
        if part.kind is Kind.CALL:
            assert part.name is not None
            calls.append((part.name, json.loads(part.text)))
        else:
            texts[part.kind] = texts.get(part.kind, "") + part.text
    return {kind: text for kind, text in texts.items() if text.strip()}, calls


@pytest.mark.parametrize(("name", "text", "texts", "calls"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_a_text_means_the_same_wherever_it_is_cut(
    name: str, text: str, texts: dict[Kind, str], calls: list[tuple[str, Any]]
) -> None:
    for size in (len(text), 1, 2, 3, 7):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert summary(read(name, pieces)) == (texts, calls)


def test_text_comes_as_soon_as_it_is_no_mark() -> None:
    reader = MessageReader(known_dialects("hermes")[0], calls=True)
    said = ["".join(part.text for part in reader.read(piece, is_last=False)) for piece in ("a <", "b", "<tool", "_x")]
    assert said == ["a ", "<b", "", "<tool_x"]


def test_without_tools_marks_of_calls_are_text() -> None:
    reader = MessageReader(known_dialects("hermes")[0], calls=False)
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert reader.read(text, is_last=True) == [Part(Kind.CONTENT, text)]


def test_arguments_of_a_forced_call_come_as_they_are_written() -> None:
    reader = MessageReader(None, calls=True, forced="f")
    parts = [part for piece in ('{"a"', ": 1}") for part in reader.read(piece, is_last=False)]
    assert parts == [Part(Kind.CALL, '{"a"', "f"), Part(Kind.CALL, ": 1}")]
    assert reader.read("", is_last=True) == []


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("… <tool_call> …", "hermes"),
        ("<|start|>{{ role }}<|channel|>", "harmony"),
        ("[TOOL_CALLS]", "mistral"),
        ("{% if x %}<｜tool▁calls▁begin｜>{% endif %}</think><tool_call>", "deepseek"),
        ("Environment: ipython", "llama3"),
        ("<think>\n\n</think>", "think"),
    ],
)
def test_a_template_shows_its_family(template: str, name: str) -> None:
    found = find_dialect(known_dialects(), template)
    assert found is not None
    assert name in found.names
    assert find_dialect(known_dialects(), "{{ messages }}") is None
    named = find_dialect(known_dialects("mistral"), template)
    assert named is not None
    assert named.names == ("mistral",)


def test_a_family_that_nobody_knows_is_refused() -> None:
    with pytest.raises(RequestError, match="hermes"):
        known_dialects("nobody")
