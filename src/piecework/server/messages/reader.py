"""From a model's text, as it comes, to what it is: content, reasoning, and calls of tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from piecework.engine.text.deltas import num_certain
from piecework.server.messages.dialect import Dialect, Kind, Span

_PLAIN: Final = Dialect((), (), ())


@dataclass(frozen=True)
class Part:
    """What a text grew by.

    Attributes:
        kind: what it is.
        text: of a call, arguments as JSON, or a piece of them.
        name: of the function, where a call begins.
    """

    kind: Kind
    text: str
    name: str | None = None


@final
class MessageReader:
    """Reads one message. What may be the beginning of a mark is held back; a call comes when it is whole.

    What looks like a call and is none comes as content, with its marks.

    Args:
        dialect: how the model writes; None: its text is content.
        calls: whether calls are looked for.
        opened: the span that the prompt has opened, or None.
        forced: the function whose arguments the text is, all of it; or None.
    """

    def __init__(
        self, dialect: Dialect | None, *, calls: bool, opened: Span | None = None, forced: str | None = None
    ) -> None:
        dialect = dialect or _PLAIN
        self._spans = [span for span in dialect.spans if calls or span.kind is not Kind.CALL]
        self._dropped = dialect.dropped
        self._forced = forced
        self._text = ""
        self._span = opened
        self._kind: Kind | None = None if opened is None else opened.kind
        self._at_start = opened is None
        self._after_span = opened is not None
        self.num_calls = 0

    def read(self, text: str, *, is_last: bool) -> list[Part]:
        """Return what the text is by now; with `is_last` all of it."""
        if self._forced is not None:
            first = self._forced if not self.num_calls else None
            self.num_calls = 1
            return [Part(Kind.CALL, text, first)] if text or first else []
        self._text += text
        parts: list[Part] = []
        while (found := self._step(is_last=is_last)) is not None:
            parts += found
        return [part for part in parts if part.text or part.name]

    def _step(self, *, is_last: bool) -> list[Part] | None:
        """Return what could be told apart next, maybe nothing; None where more text is needed."""
        if self._at_start and not self._start():
            return None if not is_last or not self._text else self._rest()
        if self._span is None:
            return self._outside(is_last=is_last)
        if self._kind is None:
            return self._header(is_last=is_last)
        return self._inside(self._span, self._kind, is_last=is_last)

    def _start(self) -> bool:
        """Enter a span that only counts at the beginning; returns whether the beginning is known."""
        begun = self._text.lstrip()
        if not begun:
            return not any(span.whole_text for span in self._spans)
        self._at_start = False
        for span in self._spans:
            if span.whole_text and begun.startswith(span.open):
                self._span, self._kind = span, span.kind
        return True

    def _outside(self, *, is_last: bool) -> list[Part] | None:
        opens = {span.open: span for span in self._spans if not span.whole_text}
        mark = _first_of(self._text, (*opens, *self._dropped))
        if mark is None:
            return self._certain((*opens, *self._dropped), Kind.CONTENT, is_last=is_last)
        parts = self._take(self._text.index(mark), Kind.CONTENT)
        self._text = self._text[len(mark) :]
        if mark in opens:
            self._span = opens[mark]
            self._kind = None if self._span.header_end else self._span.kind
        self._after_span = True
        return parts

    def _header(self, *, is_last: bool) -> list[Part] | None:
        span = self._span
        assert span is not None, "only a span has a header"
        end = self._text.find(span.header_end)
        if end < 0:
            return self._rest() if is_last and self._text else None
        header = self._text[:end]
        self._kind = span.kind_of(header)
        if self._kind is not Kind.CALL:  # a call's text is read with its header
            self._text = self._text[end + len(span.header_end) :]
        return []

    def _inside(self, span: Span, kind: Kind, *, is_last: bool) -> list[Part] | None:
        ends = span.close or tuple(other.open for other in self._spans if not other.whole_text)
        mark = None if span.whole_text else _first_of(self._text, ends)
        if mark is None:
            if kind is not Kind.CALL:
                return self._certain(ends, kind, is_last=is_last)
            if not is_last:
                return None
            self._span = None
            return self._calls(span, len(self._text), "") if self._text else None
        at = self._text.index(mark)
        self._span = None
        parts = self._calls(span, at, mark) if kind is Kind.CALL else self._take(at, kind)
        if span.close:
            self._text = self._text.removeprefix(mark)
        self._after_span = True
        return parts

    def _calls(self, span: Span, length: int, mark: str) -> list[Part]:
        text, self._text = self._text[:length], self._text[length:]
        found = span.calls(text)
        if found is None:
            opened = "" if span.whole_text else span.open
            return [Part(Kind.CONTENT, opened + text + (mark if span.close else ""))]
        self.num_calls += len(found)
        return [Part(Kind.CALL, arguments, name) for name, arguments in found]

    def _certain(self, marks: tuple[str, ...], kind: Kind, *, is_last: bool) -> list[Part] | None:
        length = len(self._text) if is_last else num_certain(self._text, marks)
        return self._take(length, kind) if length else None

    def _rest(self) -> list[Part]:
        self._at_start, self._span = False, None
        return self._take(len(self._text), Kind.CONTENT)

    def _take(self, length: int, kind: Kind) -> list[Part]:
        """Return the first characters; white space that follows a mark belongs to nothing."""
        text, self._text = self._text[:length], self._text[length:]
        if self._after_span:
            text = text.lstrip()
            self._after_span = not text
        return [Part(kind, text)]


def _first_of(text: str, marks: tuple[str, ...]) -> str | None:
    """Return the mark that comes first in a text, or None."""
    found = [(place, mark) for mark in marks if (place := text.find(mark)) >= 0]
    return min(found)[1] if found else None
