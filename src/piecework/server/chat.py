"""POST /v1/chat/completions: answer a conversation."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, final

from fastapi import APIRouter, Request, Response

from piecework.server.context import ServerContext
from piecework.server.documented import generation_responses
from piecework.server.generation import AnswerFormat, Choice, Exchange, answer_stream, answer_whole
from piecework.server.logprobs import chat_logprobs
from piecework.server.params import chat_params
from piecework.server.prompts import chat_prompt
from piecework.server.requests import ChatRequest
from piecework.server.responses import ChatCompletion
from piecework.server.service import Delta, Generation


def chat_routes(context: ServerContext) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["text"])

    @router.post("/v1/chat/completions", response_model=None, responses=generation_responses(ChatCompletion))
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        began_s = time.perf_counter()
        context.check_model(body.model)
        service = context.ready_service()
        prompt = await chat_prompt(body, service=service, limits=context.settings.limits)
        params = chat_params(body, settings=context.settings, room=service.max_positions - len(prompt))
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        answer = ChatFormat(body, answer_id=answer_id, model=context.settings.model)
        exchange = Exchange(context, service, [Generation(answer_id, tuple(prompt), params)], began_s=began_s)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return await answer_stream(exchange, answer, include_usage=usage, context=context)
        return await answer_whole(request, exchange, answer, context=context)

    return router


@final
class ChatFormat(AnswerFormat):
    """How /v1/chat/completions writes an answer; `answer_id` and `model` are what it carries."""

    def __init__(self, request: ChatRequest, *, answer_id: str, model: str) -> None:
        self._answer_id = answer_id
        self._created = int(time.time())
        self._model = model
        self._n = request.n or 1
        self._logprobs = bool(request.logprobs)

    def opening(self) -> list[dict[str, Any]]:
        """Return, for each choice, the chunk that says who speaks."""
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self._n)]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """See `AnswerFormat.chunks`. The reason of the end comes in a chunk of its own, as OpenAI sends it."""
        made = []
        if delta.text or delta.logprobs:
            logprobs = chat_logprobs(delta.logprobs) if self._logprobs else None
            made.append(self._chunk(delta.index, {"content": delta.text}, logprobs=logprobs))
        if delta.finish_reason is not None:
            made.append(self._chunk(delta.index, {}, finish_reason=delta.finish_reason))
        return made

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """See `AnswerFormat.usage_chunk`."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """See `AnswerFormat.whole`."""
        made = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": chat_logprobs(choice.logprobs) if self._logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._head("chat.completion"), "choices": made, "usage": usage}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._answer_id, "object": kind, "created": self._created, "model": self._model}
