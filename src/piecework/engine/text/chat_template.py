"""Chat templates: from messages to the text of a prompt, in jinja2's sandbox and without transformers.

What templates may use is what transformers gives them: https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn, final

from piecework.errors import RequestError

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]

_ASKED: Final = "a prompt from the model's chat template"
_CUT: Final = "[the message goes on here]"


@final
class ChatTemplate:
    """One template, compiled on first use.

    Args:
        source: jinja2 text.
        special_tokens: what the template calls bos_token and so on, with their texts.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = special_tokens
        self._template: Template | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation, up to where the assistant answers.

        Args:
            messages: each with "role" and "content", as in OpenAI's API.
            tools: JSON descriptions of the functions that the model may call.
            continue_final_message: end inside of the last message, so that the model goes on with it.
            extra: further names for the template, such as "enable_thinking".

        Raises RequestError where the template fails or refuses the messages.
        """
        plain = [_plain_message(message) for message in messages]
        if continue_final_message:
            _mark_end(plain)
        names = {
            "documents": None,
            **(extra or {}),
            **self._special_tokens,
            "messages": plain,
            "tools": [dict(tool) for tool in tools] if tools else None,
            "add_generation_prompt": not continue_final_message,
        }
        text = self._run(names)
        if continue_final_message:
            if _CUT not in text:
                _refuse("the template leaves out the end of the last message, so that it can't be continued")
            text = text[: text.rindex(_CUT)]
        return text

    def _run(self, names: Mapping[str, Any]) -> str:
        from jinja2 import TemplateError  # noqa: PLC0415  # costs 30 ms, which only chats need to pay

        try:
            if self._template is None:
                self._template = _compile(self.source)
            return self._template.render(names)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise RequestError(
                asked=_ASKED,
                found=f"the template fails: {error}",
                try_="use the roles, the order and the fields that the model's documentation shows",
            ) from error


def _compile(source: str) -> Template:
    from jinja2 import nodes  # noqa: PLC0415  # see above
    from jinja2.ext import Extension  # noqa: PLC0415
    from jinja2.parser import Parser  # noqa: PLC0415
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    class Generation(Extension):
        """{% generation %} marks what to train on; here only its content counts."""

        tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _plain_message(message: Message) -> dict[str, Any]:
    """Return a message as templates expect it: text content in one string, arguments of tool calls as an object.

    The role "developer" becomes "system", its other name, which more templates know.
    """
    plain = dict(message)
    if plain.get("role") == "developer":
        plain["role"] = "system"
    content = plain.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        plain["content"] = "\n".join(_text_of(part) for part in content)
    elif content is None:
        plain["content"] = ""
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_tool_call(call) for call in plain["tool_calls"]]
    return plain


def _text_of(part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RequestError(asked=_ASKED, found=f"content of type {kind!r}", try_="text only")


def _plain_tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return dict(call)  # what a model wrote needn't be JSON
    return {**call, "function": {**function, "arguments": arguments}}


def _mark_end(messages: list[dict[str, Any]]) -> None:
    if not messages or not isinstance(messages[-1].get("content"), str):
        _refuse("no last message with text that could be continued")
    messages[-1]["content"] += _CUT


def _to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  # as transformers has it
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Write JSON for a template; unlike jinja2's own filter, without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _refuse(message: str) -> NoReturn:
    """Let a template refuse its messages."""
    raise RequestError(asked=_ASKED, found=message, try_="change the messages accordingly")
