"""POST /v1/responses: answer a conversation, as the newer of OpenAI's interfaces has it, without storing anything."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter, Request, Response

from piecework.server.chat.conversation import begin_conversation
from piecework.server.chat.response_bodies import ResponseAnswer, ResponseEvent, ResponseRequest
from piecework.server.chat.response_format import ResponseFormat
from piecework.server.chat.response_input import as_chat
from piecework.server.context import ServerContext
from piecework.server.generation import Exchange, answer_stream, answer_whole
from piecework.server.responses import generation_responses


def response_routes(context: ServerContext) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["text"])
    documented = generation_responses(ResponseAnswer, chunk=ResponseEvent)

    @router.post("/v1/responses", response_model=None, responses=documented)
    async def create_response(body: ResponseRequest, request: Request) -> Response:
        """Answer a conversation; each request says all of it."""
        began_s = time.perf_counter()
        context.check_body(body, request)
        service = context.ready_service()
        answer_id = f"resp_{uuid.uuid4().hex}"
        talk = await begin_conversation(as_chat(body), answer_id=answer_id, service=service, context=context)
        answer = ResponseFormat(body, talk, answer_id=answer_id, model=context.settings.model)
        exchange = Exchange(context, service, [talk.asked], began_s=began_s)
        if body.stream:
            return await answer_stream(exchange, answer, include_usage=True, context=context)
        return await answer_whole(request, exchange, answer, context=context)

    return router
