"""From what a client sent to what the engine takes: prompts become tokens, fields become sampling parameters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from piecework.engine.request import GenerationRequest
from piecework.engine.sampling_params import SamplingParams, StructuredOutput
from piecework.errors import RequestError
from piecework.server.errors import ApiError, invalid
from piecework.server.messages.tool_use import ToolUse
from piecework.server.requests import ChatRequest, CompletionRequest, Sampling
from piecework.server.service import Service
from piecework.server.settings import ServerSettings

_COMPLETION_TOKENS: Final = 16  # where a request to /v1/completions doesn't say, as OpenAI has it
_MOST_CHARACTERS: Final = 8  # per token; of a text with more of them, a beginning is encoded first
_SLACK: Final = 16  # tokens by which the end of a beginning may differ from that of the whole text
_LONG: Final = 4096  # characters; longer texts are encoded beside the event loop, which costs a switch of threads


async def completion_requests(
    body: CompletionRequest, *, answer_id: str, service: Service, settings: ServerSettings
) -> list[GenerationRequest]:
    """Return what continues each of a request's prompts. Raises ApiError for what isn't possible."""
    params = _completion_params(body, settings=settings)
    prompts = await _completion_prompts(body, service=service, settings=settings)
    longest = service.max_positions
    return [
        GenerationRequest(f"{answer_id}-{number}", prompt, _fitted(params, room=longest - len(prompt)))
        for number, prompt in enumerate(prompts)
    ]


async def chat_request(
    body: ChatRequest, tools: ToolUse, *, answer_id: str, service: Service, settings: ServerSettings
) -> GenerationRequest:
    """Return what answers a conversation, whose tools are used like this.

    Raises ApiError for what isn't possible, RequestError where the chat template refuses the messages.
    """
    prompt = await chat_prompt(body, tools, service=service, settings=settings)
    params = _chat_params(body, settings=settings, room=service.max_positions - len(prompt))
    if tools.constraint is not None:
        params = replace(params, structured=tools.constraint)
    return GenerationRequest(answer_id, prompt, params)


async def _completion_prompts(
    request: CompletionRequest, *, service: Service, settings: ServerSettings
) -> list[tuple[int, ...]]:
    """Return the tokens of each prompt. Raises ApiError for none, too many, or one that is too long."""
    prompt, most = request.prompt, settings.limits.prompts
    texts: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
    if not texts:
        raise invalid("prompt: at least one is needed", param="prompt")
    if len(texts) > most:
        raise invalid(f"prompt: {len(texts)} prompts are more than this server's {most}", param="prompt")
    prompts = []
    for text in texts:
        if isinstance(text, str):
            await _check_size(text, service=service, settings=settings, param="prompt")
        tokens = await _encoded(text, service.encode) if isinstance(text, str) else text
        prompts.append(_checked(tokens, service=service, settings=settings, param="prompt"))
    return prompts


async def chat_prompt(
    request: ChatRequest, tools: ToolUse, *, service: Service, settings: ServerSettings
) -> tuple[int, ...]:
    """Return the tokens of a conversation. Raises ApiError, RequestError."""
    messages = [message.model_dump(exclude_none=True) for message in request.messages]
    extra = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        extra.setdefault("reasoning_effort", request.reasoning_effort)

    def encode(_text: str) -> list[int]:
        return service.encode_chat(messages, tools=tools.offered or None, extra=extra)

    # the length decides where it is encoded; the text itself is in the messages
    text = "".join(str(message.get("content", "")) for message in messages)
    await _check_size(text, service=service, settings=settings, param="messages")
    tokens = await _encoded(text, encode)
    return _checked(tokens, service=service, settings=settings, param="messages")


async def _encoded(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    return encode(text) if len(text) < _LONG else await asyncio.to_thread(encode, text)


async def _check_size(text: str, *, service: Service, settings: ServerSettings, param: str) -> None:
    """Raise ApiError where a part of a very long text is too long already: to encode all of it takes seconds."""
    most = _most_tokens(service, settings)
    if len(text) > _MOST_CHARACTERS * most:
        tokens = await _encoded(text[: _MOST_CHARACTERS * most], service.encode)
        if len(tokens) > most + _SLACK:
            raise _too_long(f"more than {len(tokens) - _SLACK}", most=most, param=param)


def _most_tokens(service: Service, settings: ServerSettings) -> int:
    longest = service.max_positions - 1
    return min(longest, settings.limits.prompt_tokens or longest)


def _too_long(found: str, *, most: int, param: str) -> ApiError:
    return invalid(
        f"{param}: {found} tokens, where this server takes prompts of at most {most}",
        param=param,
        code="context_length_exceeded",
    )


def _checked(tokens: list[int], *, service: Service, settings: ServerSettings, param: str) -> tuple[int, ...]:
    """Return a prompt's tokens; raises ApiError where there are none or too many."""
    if not tokens:
        raise invalid(f"{param}: no tokens; at least one is needed, such as the model's BOS token", param=param)
    most = _most_tokens(service, settings)
    if len(tokens) > most:
        raise _too_long(str(len(tokens)), most=most, param=param)
    return tuple(tokens)


def _completion_params(request: CompletionRequest, *, settings: ServerSettings) -> SamplingParams:
    """Return how to continue a plain prompt. Raises ApiError for what isn't possible.

    `max_tokens` 0 (with `echo`, to score a text) becomes 1, because a forward ends in a token; whoever asked drops it.
    """
    if request.suffix:
        raise invalid("suffix: filling a gap isn't supported", param="suffix")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise invalid("best_of: only a value equal to n is supported", param="best_of")
    if request.max_tokens == 0 and not request.echo:
        raise invalid("max_tokens: 0 makes sense with echo only", param="max_tokens")
    _check_logprobs(request.logprobs, param="logprobs", settings=settings)
    most = _COMPLETION_TOKENS if request.max_tokens is None else max(1, request.max_tokens)
    return _params(
        request,
        settings=settings,
        max_tokens=most,
        logprobs=request.logprobs,
        echoed_logprobs=request.logprobs if request.echo else None,
    )


def _chat_params(request: ChatRequest, *, settings: ServerSettings, room: int) -> SamplingParams:
    """Return how to answer a conversation. Raises ApiError for what isn't possible.

    Args:
        request: the body.
        settings: the server's.
        room: tokens that fit behind the prompt, at least 1; the most, and the default.
    """
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs: needs logprobs to be true", param="top_logprobs")
    _check_logprobs(request.top_logprobs, param="top_logprobs", settings=settings)
    params = _params(
        request,
        settings=settings,
        max_tokens=request.max_completion_tokens or request.max_tokens or room,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    return _fitted(params, room=room)


def _fitted(params: SamplingParams, *, room: int) -> SamplingParams:
    """Return `params` with no more tokens than fit behind the prompt: a text ends there, by its length."""
    if params.max_tokens <= room:
        return params
    return replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))


def _check_logprobs(count: int | None, *, param: str, settings: ServerSettings) -> None:
    most = settings.limits.logprobs
    if count is not None and count > most:
        raise invalid(f"{param}: {count} is more than this server's {most}", param=param)


def _params(
    request: Sampling,
    *,
    settings: ServerSettings,
    max_tokens: int,
    logprobs: int | None,
    echoed_logprobs: int | None = None,
) -> SamplingParams:
    if request.prompt_logprobs is not None and request.stream:
        raise invalid("prompt_logprobs: not in a stream", param="prompt_logprobs")
    _check_logprobs(request.prompt_logprobs, param="prompt_logprobs", settings=settings)
    wanted = [count for count in (request.prompt_logprobs, echoed_logprobs) if count is not None]
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options: needs stream to be true", param="stream_options")
    n = request.n or 1
    if n > settings.limits.n:
        raise invalid(f"n: {n} is more than this server's {settings.limits.n}", param="n")
    given: dict[str, Any] = {
        "temperature": request.temperature,
        "top_k": None if request.top_k is None else max(0, request.top_k),  # -1 means all, as for vLLM
        "top_p": request.top_p,
        "min_p": request.min_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "seed": request.seed,
        "stop": request.stop,
        "stop_token_ids": request.stop_token_ids,
        "ignore_eos": request.ignore_eos,
        "min_tokens": request.min_tokens,
        "logit_bias": {int(token): bias for token, bias in (request.logit_bias or {}).items()},
        "structured": _structured(request),
        "skip_special_tokens": request.skip_special_tokens,
    }
    given = {name: value for name, value in given.items() if value is not None}
    defaults = {"temperature": 1.0, **settings.defaults.given()}
    most = min(max_tokens, defaults.pop("max_tokens", max_tokens))
    try:
        return SamplingParams(
            **{**defaults, **given},
            max_tokens=most,
            n=n,
            logprobs=logprobs,
            prompt_logprobs=max(wanted, default=None),
        )
    except RequestError as error:
        param = error.found.partition(" ")[0]
        raise invalid(f"{error.found}: expected {error.try_}", param=param if param in given else None) from error


def _structured(request: Sampling) -> StructuredOutput | None:
    """Return what the text has to match; raises ApiError for two of them, RequestError for a schema that is no JSON."""
    asked, other = request.response_format, request.structured_outputs
    has_format = asked is not None and asked.type != "text"
    if other is not None:
        if has_format:
            raise invalid("structured_outputs: not together with response_format", param="structured_outputs")
        try:
            return StructuredOutput(
                json_schema=other.json_,
                regex=other.regex,
                json_object=bool(other.json_object),
                choice=other.choice,
                grammar=other.grammar,
            )
        except RequestError as error:
            raise invalid(
                f"structured_outputs: {error.found}; expected {error.try_}", param="structured_outputs"
            ) from error
    if asked is None or not has_format:
        return None
    if asked.type == "json_object":
        return StructuredOutput(json_object=True)
    if asked.json_schema is None or asked.json_schema.schema_ is None:
        raise invalid("response_format: json_schema needs a schema", param="response_format")
    return StructuredOutput(json_schema=asked.json_schema.schema_)
