"""From a request's prompt or messages to tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Final

from piecework.server.errors import ApiError, invalid
from piecework.server.requests import ChatMessage, ChatRequest, CompletionRequest
from piecework.server.service import Service
from piecework.server.settings import Limits

_LONG: Final = 4096  # characters; longer texts are encoded beside the event loop, which costs a switch of threads


async def completion_prompts(request: CompletionRequest, *, service: Service, limits: Limits) -> list[list[int]]:
    """Return the tokens of each prompt. Raises ApiError for none, too many, or one that is too long."""
    prompt = request.prompt
    texts: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
    if not texts:
        raise invalid("prompt: at least one is needed", param="prompt")
    if len(texts) > limits.prompts:
        raise invalid(f"prompt: {len(texts)} prompts are more than this server's {limits.prompts}", param="prompt")
    prompts = []
    for text in texts:
        tokens = await _encode(text, service.encode) if isinstance(text, str) else text
        _check_length(tokens, service=service, limits=limits, param="prompt")
        prompts.append(tokens)
    return prompts


async def chat_prompt(request: ChatRequest, *, service: Service, limits: Limits) -> list[int]:
    """Return the tokens of a conversation. Raises ApiError where it is too long, RequestError for its template."""
    messages = [_as_template_message(message) for message in request.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    if request.tool_choice not in (None, "auto", "none"):
        raise invalid("tool_choice: only none and auto are supported", param="tool_choice")
    offered = tools if tools and request.tool_choice != "none" else None

    def encode(_text: str) -> list[int]:
        return service.encode_chat(messages, tools=offered, template_arguments=request.chat_template_kwargs or {})

    # the length decides where it is encoded; the text itself is in the messages
    tokens = await _encode("".join(str(message["content"]) for message in messages), encode)
    _check_length(tokens, service=service, limits=limits, param="messages")
    return tokens


async def _encode(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    return encode(text) if len(text) < _LONG else await asyncio.to_thread(encode, text)


def _check_length(tokens: list[int], *, service: Service, limits: Limits, param: str) -> None:
    if not tokens:
        raise invalid(f"{param}: no tokens; at least one is needed, such as the model's BOS token", param=param)
    longest = service.max_positions - 1
    most = min(longest, limits.prompt_tokens or longest)
    if len(tokens) > most:
        raise ApiError(
            400,
            f"{param}: {len(tokens)} tokens, where this server takes prompts of at most {most}",
            param=param,
            code="context_length_exceeded",
        )


def _as_template_message(message: ChatMessage) -> dict[str, Any]:
    """Return a message as chat templates expect it: text in one string, calls' arguments as objects."""
    made = message.model_dump(exclude_none=True)
    if message.role == "developer":
        made["role"] = "system"  # its other name; few templates know it
    content = message.content
    made["content"] = content if isinstance(content, str) else "\n".join(part.text for part in content or ())
    for call in made.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except ValueError:
            continue  # not JSON: the template gets the text as it is
    return made
