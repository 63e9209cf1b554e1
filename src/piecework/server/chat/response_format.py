"""How /v1/responses writes an answer: items, and the events by which they grow."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Final, final

from piecework.engine.request import FinishReason
from piecework.engine.text.completion import Completion
from piecework.engine.text.deltas import TextDelta
from piecework.server.chat.conversation import Conversation, Message
from piecework.server.chat.response_bodies import (
    CachedTokens,
    Incomplete,
    OutputItem,
    OutputText,
    ReasoningTokens,
    ResponseAnswer,
    ResponseEvent,
    ResponseRequest,
    ResponseUsage,
)
from piecework.server.generation import AnswerFormat
from piecework.server.messages.dialect import Kind
from piecework.server.messages.reader import Part
from piecework.server.responses import Usage

_TYPES: Final = {Kind.CONTENT: "message", Kind.REASONING: "reasoning", Kind.CALL: "function_call"}
_IDS: Final = {Kind.CONTENT: "msg", Kind.REASONING: "rs", Kind.CALL: "fc"}
_TEXTS: Final = {Kind.CONTENT: "output_text", Kind.REASONING: "reasoning_text"}


@final
class ResponseFormat(AnswerFormat):
    """Writes one answer.

    Args:
        body: what the client sent.
        talk: what reads the model's text.
        answer_id: the answer's.
        model: the name that it carries.
    """

    def __init__(self, body: ResponseRequest, talk: Conversation, *, answer_id: str, model: str) -> None:
        self._body = body
        self._message = Message(talk)
        self._head: dict[str, Any] = {"id": answer_id, "created_at": int(time.time()), "model": model}
        self._items: list[OutputItem] = []
        self._kind: Kind | None = None
        self._number = 0
        self._reason = FinishReason.STOP

    def opening(self) -> list[ResponseEvent]:
        """See `AnswerFormat.opening`."""
        return [self._event("response.created", response=self._answer("in_progress", usage=None)), self._in_progress()]

    def chunks(self, prompt: int, delta: TextDelta) -> list[ResponseEvent]:
        """See `AnswerFormat.chunks`."""
        assert prompt == 0, "a conversation is one prompt"
        ended = delta.finish_reason is not None
        events = self._read(delta.text, is_last=ended)
        self._reason = delta.finish_reason or self._reason
        if not events and delta.tokens and not ended:
            events = [self._in_progress()] if self._kind is None else self._grow("")
        return events + (self._close() if ended else [])

    def usage_chunk(self, usage: Usage) -> ResponseEvent:
        """Return the last event, which has the whole answer."""
        status = self._status()
        return self._event(f"response.{status}", response=self._answer(status, usage=usage))

    def whole(self, completions: Sequence[Completion], usage: Usage) -> ResponseAnswer:
        """See `AnswerFormat.whole`."""
        (made,) = completions[0].continuations
        self._reason = made.finish_reason
        self._read(made.text, is_last=True)
        self._close()
        return self._answer(self._status(), usage=usage)

    def _read(self, text: str, *, is_last: bool) -> list[ResponseEvent]:
        return [event for part in self._message.read(text, is_last=is_last) for event in self._add(part)]

    def _add(self, part: Part) -> list[ResponseEvent]:
        """Add a part to the last item, or begin one with it."""
        if part.kind is self._kind and part.name is None:
            return self._grow(part.text)
        events = self._close()
        self._kind = part.kind
        self._items.append(_new_item(part))
        events.append(self._event("response.output_item.added", **self._place(), item=self._items[-1]))
        if part.kind is not Kind.CALL:
            empty = _text_of(part.kind, "")
            self._items[-1] = self._items[-1].model_copy(update={"content": [empty]})
            events.append(self._event("response.content_part.added", **self._inside(), part=empty))
        return events + self._grow(part.text)

    def _grow(self, text: str) -> list[ResponseEvent]:
        item, kind = self._items[-1], self._kind
        assert kind is not None, "an item that grows has a kind"
        if kind is Kind.CALL:
            self._items[-1] = item.model_copy(update={"arguments": item.arguments + text})
            place = {**self._place(), "item_id": item.id}
            return [self._event("response.function_call_arguments.delta", **place, delta=text)]
        self._items[-1] = item.model_copy(update={"content": [_text_of(kind, item.content[0].text + text)]})
        more: dict[str, Any] = {"logprobs": []} if kind is Kind.CONTENT else {}
        return [self._event(f"response.{_TEXTS[kind]}.delta", **self._inside(), delta=text, **more)]

    def _close(self) -> list[ResponseEvent]:
        """End the last item, if there is one that grows."""
        if self._kind is None:
            return []
        kind, self._kind = self._kind, None
        item = self._items[-1] = self._items[-1].model_copy(update={"status": self._status()})
        if kind is Kind.CALL:
            place = {**self._place(), "item_id": item.id}
            events = [self._event("response.function_call_arguments.done", **place, arguments=item.arguments)]
        else:
            more: dict[str, Any] = {"logprobs": []} if kind is Kind.CONTENT else {}
            text = item.content[0]
            events = [
                self._event(f"response.{_TEXTS[kind]}.done", **self._inside(), text=text.text, **more),
                self._event("response.content_part.done", **self._inside(), part=text),
            ]
        return [*events, self._event("response.output_item.done", **self._place(), item=item)]

    def _in_progress(self) -> ResponseEvent:
        return self._event("response.in_progress", response=self._answer("in_progress", usage=None))

    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self._items) - 1}

    def _inside(self) -> dict[str, Any]:
        return {**self._place(), "item_id": self._items[-1].id, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        self._number += 1
        return ResponseEvent(type=kind, sequence_number=self._number - 1, **fields)

    def _status(self) -> str:
        return "incomplete" if self._reason is FinishReason.LENGTH else "completed"

    def _answer(self, status: str, *, usage: Usage | None) -> ResponseAnswer:
        body = self._body
        choice = body.tool_choice or "auto"
        more: dict[str, Any] = {"status": status, "usage": None if usage is None else _usage(usage)}
        return ResponseAnswer(
            **self._head,
            **more,
            object="response",
            output=list(self._items),
            error=None,
            incomplete_details=Incomplete(reason="max_output_tokens") if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=None,
            store=False,
            temperature=body.temperature,
            tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
            tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            top_p=body.top_p,
        )


def _new_item(part: Part) -> OutputItem:
    kind, name = part.kind, uuid.uuid4().hex[:24]
    fields: dict[str, Any] = {"type": _TYPES[kind], "id": f"{_IDS[kind]}_{name}", "status": "in_progress"}
    if kind is Kind.CALL:
        return OutputItem(**fields, call_id=f"call_{name}", name=part.name or "", arguments="")
    if kind is Kind.REASONING:
        return OutputItem(**fields, summary=[], content=[])
    return OutputItem(**fields, role="assistant", content=[])


def _text_of(kind: Kind, text: str) -> OutputText:
    if kind is Kind.REASONING:
        return OutputText(type="reasoning_text", text=text)
    return OutputText(type="output_text", text=text, annotations=[], logprobs=[])


def _usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=CachedTokens(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=ReasoningTokens(reasoning_tokens=0),
        total_tokens=usage.total_tokens,
    )
