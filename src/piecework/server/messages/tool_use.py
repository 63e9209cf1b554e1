"""What a request says of tools: which the model is told of, and whether it must call one of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from piecework.engine.sampling_params import JSON_SPACE, StructuredOutput
from piecework.server.errors import invalid
from piecework.server.messages.dialect import Dialect, Kind, Span, StrictForm
from piecework.server.messages.reader import MessageReader
from piecework.server.requests import ChatRequest, NamedTool, Tool

_ANY_ARGUMENTS: Final[Mapping[str, Any]] = {"type": "object"}
_LIST: Final = Dialect((), (), (Span(Kind.CALL, "[", whole_text=True),))
"""How a text is read that was made to be a list of calls."""


@dataclass(frozen=True)
class ToolUse:
    """What follows of a request's tools.

    Attributes:
        offered: what the chat template is told of, as JSON.
        constraint: what the text has to match where a tool must be called: its arguments, or a list of calls.
        forced: the function that must be called, or None.
        required: whether the text is calls, and nothing else.
    """

    offered: tuple[Mapping[str, Any], ...] = ()
    constraint: StructuredOutput | None = None
    forced: str | None = None
    required: bool = False

    @property
    def may_call(self) -> bool:
        """Whether calls are looked for in the text."""
        return bool(self.offered)

    def reader(self, dialect: Dialect | None, *, opened: Span | None) -> MessageReader:
        """Return what reads one message; `opened` is the span that the prompt has opened."""
        if self.required:
            return MessageReader(_LIST, calls=True, forced=self.forced)
        return MessageReader(dialect, calls=self.may_call, opened=opened)


def tool_use(body: ChatRequest, dialect: Dialect | None) -> ToolUse:
    """Return what follows of a request's tools, of a model that writes like this.

    Raises ApiError for a choice that can't be made, and for strict functions where nothing can hold the model to them.
    """
    tools, choice = body.tools or [], body.tool_choice
    if choice in (None, "auto", "none"):
        if choice == "none" or not tools:
            return ToolUse()
        offered = tuple(tool.model_dump(exclude_none=True) for tool in tools)
        return ToolUse(offered, _strict_calls(body, dialect) if any(t.function.strict for t in tools) else None)
    if not tools:
        raise invalid("tool_choice: there are no tools to choose from", param="tool_choice")
    if body.response_format is not None and body.response_format.type != "text":
        raise invalid("tool_choice: not together with response_format", param="tool_choice")
    offered = tuple(tool.model_dump(exclude_none=True) for tool in tools)
    if isinstance(choice, NamedTool):
        name = choice.function.name
        schema = next((_schema(tool) for tool in tools if tool.function.name == name), None)
        if schema is None:
            raise invalid(f"tool_choice: no tool is called {name!r}", param="tool_choice")
        return ToolUse(offered, StructuredOutput(json_schema=schema), forced=name, required=True)
    most = {"maxItems": 1} if body.parallel_tool_calls is False else {}
    return ToolUse(offered, StructuredOutput(json_schema={**_calls_schema(tools), **most}), required=True)


def _schema(tool: Tool) -> Mapping[str, Any]:
    return tool.function.parameters or _ANY_ARGUMENTS


def _strict_calls(body: ChatRequest, dialect: Dialect | None) -> StructuredOutput:
    """Return a grammar of any text whose calls match their functions' schemas, as the model's family writes calls."""
    form = None if dialect is None else dialect.strict
    has_format = body.response_format is not None and body.response_format.type != "text"
    if form is None or has_format or body.structured_outputs is not None:
        why = "this model's calls can't be held to a schema" if form is None else "not together with another constraint"
        raise invalid(f"tools: strict: {why}; use tool_choice required or a named function", param="tools")
    calls = [_call_rule(tool, form) for tool in body.tools or ()]
    each = [f"call_{number}: {rule}" for number, rule in enumerate(calls)]
    names = " | ".join(f"call_{number}" for number in range(len(calls)))
    if form.trigger:
        text = ["start: (before (" + names + "))* TEXT", f"before[lazy]: TEXT {json.dumps(form.trigger)}"]
        text.append("TEXT: /(.|\\n)*/")
    else:
        text = [f"start: {names} | TEXT", "TEXT: /([^{](.|\\n)*)?/"]
    return StructuredOutput(grammar="\n".join([*text, *each]))


def _call_rule(tool: Tool, form: StrictForm) -> str:
    """Return the right side of a rule for one function's calls; functions that aren't strict take any arguments."""
    begin = form.begin + json.dumps(tool.function.name) + form.middle
    schema = _schema(tool) if tool.function.strict else _ANY_ARGUMENTS
    spaced = {"x-guidance": {"whitespace_pattern": JSON_SPACE}, **schema}
    return f"{json.dumps(begin)} %json {json.dumps(spaced)} {json.dumps(form.end)}"


def _calls_schema(tools: Iterable[Tool]) -> dict[str, Any]:
    """Return the schema of a list of calls; definitions move to its top, where references look for them."""
    definitions: dict[str, Any] = {}
    each = []
    for tool in tools:
        schema = dict(_schema(tool))
        for key in ("$defs", "definitions"):
            own = schema.pop(key, None)
            if not isinstance(own, Mapping):
                continue
            known = definitions.setdefault(key, {})
            if any(known.get(name, value) != value for name, value in own.items()):
                raise invalid(f"tools: two functions define {key} of one name differently", param="tools")
            known.update(own)
        properties = {"name": {"const": tool.function.name}, "arguments": schema}
        each.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    kept = {key: value for key, value in definitions.items() if value}
    return {"type": "array", "minItems": 1, "items": {"anyOf": each}, **kept}
