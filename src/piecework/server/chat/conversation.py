"""What both routes of conversations begin with: from messages to what generates, and to what reads its text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, final

from piecework.engine.request import FinishReason, GenerationRequest
from piecework.server.context import ServerContext
from piecework.server.engine_requests import chat_request
from piecework.server.messages.dialect import Dialect, Kind, Span
from piecework.server.messages.reader import Part
from piecework.server.messages.tool_use import ToolUse, tool_use
from piecework.server.requests import ChatRequest
from piecework.server.responses import ChatEnd
from piecework.server.service import Service

_TAIL: Final = 8
"""How many tokens of a prompt are looked at to see whether it ends inside of reasoning."""


@dataclass(frozen=True)
class Conversation:
    """A conversation that is to be answered.

    Attributes:
        asked: what generates the answer.
        tools: how tools are used.
        dialect: how the model writes, where that is known.
        opened: the reasoning that the prompt has opened, or None.
        most_calls: of tools; None for any number.
    """

    asked: GenerationRequest
    tools: ToolUse
    dialect: Dialect | None
    opened: Span | None
    most_calls: int | None


@final
class Message:
    """One answer to a conversation, while it is read."""

    def __init__(self, talk: Conversation) -> None:
        self._reader = talk.tools.reader(talk.dialect, opened=talk.opened)
        self._most = talk.most_calls
        self._num_calls = 0

    def read(self, text: str, *, is_last: bool) -> list[Part]:
        """Return what a text adds; calls beyond the most are left out."""
        kept = []
        for part in self._reader.read(text, is_last=is_last):
            self._num_calls += part.name is not None
            if part.kind is not Kind.CALL or self._most is None or self._num_calls <= self._most:
                kept.append(part)
        return kept

    def end(self, reason: FinishReason) -> ChatEnd:
        """Return why it ended."""
        return "tool_calls" if self._num_calls and reason is FinishReason.STOP else reason


async def begin_conversation(
    body: ChatRequest, *, answer_id: str, service: Service, context: ServerContext
) -> Conversation:
    """Return what a request comes to. Raises ApiError, RequestError."""
    dialect = context.dialect(service)
    tools = tool_use(body, dialect)
    asked = await chat_request(body, tools, answer_id=answer_id, service=service, settings=context.settings)
    if dialect is not None and dialect.special_tokens and not tools.required:
        asked = replace(asked, params=replace(asked.params, skip_special_tokens=False))
    opened = None
    if dialect is not None and dialect.reasoning is not None:
        ends_inside = service.decode(asked.prompt[-_TAIL:]).rstrip().endswith(dialect.reasoning.open)
        opened = dialect.reasoning if ends_inside else None
    return Conversation(asked, tools, dialect, opened, 1 if body.parallel_tool_calls is False else None)
