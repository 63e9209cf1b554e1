"""How a family of models writes reasoning and calls of tools: read from `dialects/*.json`, one small file each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from importlib.resources import files
from typing import Any, Final

from piecework.errors import RequestError

_ORDER: Final = ("harmony", "deepseek", "hermes", "mistral", "llama3", "think")
"""In which a chat template is looked through; the first whose mark it has is the model's."""


class Kind(Enum):
    """What a part of a model's text is."""

    CONTENT = "content"
    REASONING = "reasoning"
    CALL = "call"


@dataclass(frozen=True)
class Span:
    """A marked part of the text, from `open` to one of `close`; without these to the next mark or the end.

    Attributes:
        kind: what it is, unless its header says otherwise.
        open: the mark that it begins with.
        close: marks that it ends with.
        header_end: the mark up to which it has a header, or "".
        headers: regular expressions, one of which a header may have, and what the span is then.
        patterns: regular expressions, with the groups `name` and `arguments`, of a call's text without its marks; where
            none fits, and without any, the text is JSON: objects with "name" and "arguments" or "parameters".
        whole_text: whether `open` counts at the very beginning only, and is part of the text.
    """

    kind: Kind
    open: str
    close: tuple[str, ...] = ()
    header_end: str = ""
    headers: Mapping[str, Kind] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()
    whole_text: bool = False

    def kind_of(self, header: str) -> Kind:
        """Return what a span with this header is."""
        return next((kind for mark, kind in self.headers.items() if re.search(mark, header)), self.kind)

    def calls(self, text: str) -> list[tuple[str, str]] | None:
        """Return the calls in a span's text, each a name and its arguments as JSON; None where it has none."""
        for pattern in self.patterns:
            found = re.fullmatch(pattern, text.strip(), re.DOTALL)
            if found is not None and _is_object(found["arguments"]):
                return [(found["name"].strip(), found["arguments"].strip())]
        return calls_in_json(text)


@dataclass(frozen=True)
class StrictForm:
    """The exact text of a call: `begin`, the name and `middle`, both as JSON has them, the arguments, `end`.

    Attributes:
        trigger: what a text has before a call, wherever that is; "" where a call is a whole text.
    """

    begin: str
    middle: str
    end: str
    trigger: str = ""


@dataclass(frozen=True)
class Dialect:
    """How a family of models writes.

    Attributes:
        names: what it is called; vLLM's names of parsers among them.
        recognised_by: texts of which a chat template of the family has one.
        spans: the marked parts.
        dropped: marks between spans that are no text.
        strict: how calls are written that have to match their functions' schemas; None where that can't be said.
        special_tokens: whether marks are special tokens, which a text otherwise leaves out.
    """

    names: tuple[str, ...]
    recognised_by: tuple[str, ...]
    spans: tuple[Span, ...]
    dropped: tuple[str, ...] = ()
    special_tokens: bool = False
    strict: StrictForm | None = None

    @cached_property
    def reasoning(self) -> Span | None:
        """The span of reasoning that a prompt may have opened already."""
        return next((span for span in self.spans if span.kind is Kind.REASONING), None)


def known_dialects(name: str | None = None) -> tuple[Dialect, ...]:
    """Return the dialect of this name alone, or all of them; raises RequestError where none has it."""
    every = _read_dialects()
    if name is None:
        return every
    chosen = next((dialect for dialect in every if name in dialect.names), None)
    if chosen is None:
        names = ", ".join(name for dialect in every for name in dialect.names)
        raise RequestError(asked="start the server", found=f"no parser of calls {name!r}", try_=f"one of {names}")
    return (replace(chosen, recognised_by=("",)),)


def find_dialect(dialects: Sequence[Dialect], template: str) -> Dialect | None:
    """Return the dialect that a chat template's text shows; None where none does."""
    return next((dialect for dialect in dialects if any(mark in template for mark in dialect.recognised_by)), None)


def calls_in_json(text: str) -> list[tuple[str, str]] | None:
    """Return calls written as JSON objects, or as a list of them; None for any other text."""
    values: list[Any] = []
    decoder, place = json.JSONDecoder(), 0
    text = text.strip(" \t\r\n;,")
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return None
        values += value if isinstance(value, list) else [value]
        place += len(text[place:]) - len(text[place:].lstrip(" \t\r\n;,"))
    calls = [_call(value) for value in values]
    return [call for call in calls if call is not None] if calls and None not in calls else None


def _call(value: object) -> tuple[str, str] | None:
    if not isinstance(value, Mapping):
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if not isinstance(name, str) or not name:
        return None
    if isinstance(arguments, str):
        return (name, arguments) if _is_object(arguments) else None
    return (name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, Mapping) else None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _read_dialects() -> tuple[Dialect, ...]:
    """Return all dialects, in the order in which a chat template is looked through."""
    folder = files("piecework.server.messages").joinpath("dialects")
    return tuple(_dialect(json.loads(folder.joinpath(f"{name}.json").read_text(encoding="utf-8"))) for name in _ORDER)


def _dialect(data: Mapping[str, Any]) -> Dialect:
    return Dialect(
        names=tuple(data["names"]),
        recognised_by=tuple(data["recognised_by"]),
        spans=tuple(_span(span) for span in data["spans"]),
        dropped=tuple(data.get("dropped", ())),
        special_tokens=data.get("special_tokens", False),
        strict=StrictForm(**data["strict"]) if "strict" in data else None,
    )


def _span(data: Mapping[str, Any]) -> Span:
    lists = {name: tuple(data[name]) for name in ("close", "patterns") if name in data}
    headers = {mark: Kind(kind) for mark, kind in data.get("headers", {}).items()}
    return Span(**{**data, **lists, "kind": Kind(data["kind"]), "headers": headers})
