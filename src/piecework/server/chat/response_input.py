"""From what /v1/responses is asked to the conversation that /v1/chat/completions would be asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from piecework.server.chat.response_bodies import InputItem, InputPart, NamedChoice, ResponseRequest
from piecework.server.errors import invalid
from piecework.server.requests import ChatRequest


def as_chat(body: ResponseRequest) -> ChatRequest:
    """Return the same request for a chat. Raises ApiError for items that say too little."""
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    items = [InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    given: dict[str, Any] = {
        "model": body.model,
        "messages": [*messages, *_messages(items)],
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stream": body.stream,
        "parallel_tool_calls": body.parallel_tool_calls,
        "tool_choice": body.tool_choice,
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
        "response_format": _format(body),
    }
    if body.tools:
        functions = [tool.model_dump(exclude={"type"}, exclude_none=True) for tool in body.tools]
        given["tools"] = [{"type": "function", "function": function} for function in functions]
    if isinstance(body.tool_choice, NamedChoice):
        given["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    if not given["messages"]:
        raise invalid("input: no message", param="input")
    return ChatRequest.model_validate(given)


def _messages(items: Iterable[InputItem]) -> list[dict[str, Any]]:
    """Return messages; calls that follow one another are one message's."""
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        match item.type:
            case "function_call":
                if not messages or "tool_calls" not in messages[-1]:
                    messages.append({"role": "assistant", "content": "", "tool_calls": []})
                messages[-1]["tool_calls"].append(_call(item, number))
            case "function_call_output":
                text = _text(item.output)
                messages.append({"role": "tool", "tool_call_id": item.call_id or "", "content": text})
            case "reasoning":
                continue
            case _:
                if item.role is None:
                    raise invalid(f"input[{number}].role: a message needs one", param=f"input[{number}].role")
                messages.append({"role": item.role, "content": _text(item.content)})
    return messages


def _call(item: InputItem, number: int) -> dict[str, Any]:
    if item.name is None or item.arguments is None:
        raise invalid(f"input[{number}]: a call needs a name and arguments", param=f"input[{number}]")
    function = {"name": item.name, "arguments": item.arguments}
    return {"id": item.call_id, "type": "function", "function": function}


def _text(content: str | list[InputPart] | None) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content or ())


def _format(body: ResponseRequest) -> dict[str, Any] | None:
    asked = None if body.text is None else body.text.format
    if asked is None or asked.type != "json_schema":
        return None if asked is None else {"type": asked.type}
    return {"type": "json_schema", "json_schema": {"name": asked.name or "", "schema": asked.schema_}}
