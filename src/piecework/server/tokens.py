"""POST /tokenize and /detokenize, as vLLM has them: texts or conversations as tokens, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import APIRouter, Request, Response

from piecework.server.context import ServerContext
from piecework.server.errors import invalid
from piecework.server.requests import DetokenizeRequest, TokenizeRequest
from piecework.server.responses import DetokenizeAnswer, TokenizeAnswer, error_responses
from piecework.server.service import Service

T = TypeVar("T")


def token_routes(context: ServerContext) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["tokens"])
    errors = error_responses(400, 401, 404, 413, 415, 429, 503)

    @router.post("/tokenize", response_model=None, responses={200: {"model": TokenizeAnswer}, **errors})
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Return the tokens of a text, or of a conversation up to where the assistant answers."""
        context.check_body(body, request)
        service = context.ready_service()
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt: either a prompt or messages", param="prompt")
        tokens = await _beside(context, lambda: _tokens(body, service))
        answer = TokenizeAnswer(count=len(tokens), max_model_len=service.max_positions, tokens=tokens)
        if body.return_token_strs:
            texts = await _beside(context, lambda: [service.decode([token]) for token in tokens])
            answer = answer.model_copy(update={"token_strs": texts})
        return answer.to_response()

    @router.post("/detokenize", response_model=None, responses={200: {"model": DetokenizeAnswer}, **errors})
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Return the text of tokens."""
        context.check_body(body, request)
        service = context.ready_service()
        return DetokenizeAnswer(prompt=await _beside(context, lambda: service.decode(body.tokens))).to_response()

    return router


def _tokens(body: TokenizeRequest, service: Service) -> list[int]:
    if body.messages is None:
        return service.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    return service.encode_chat(messages, tools=tools or None, extra=body.chat_template_kwargs)


async def _beside(context: ServerContext, work: Callable[[], T]) -> T:
    """Return what `work` gives, in another thread: a long text takes a while. Counts as a request for text."""
    ticket = context.admission.admit()
    try:
        return await asyncio.to_thread(work)
    finally:
        ticket.release()
