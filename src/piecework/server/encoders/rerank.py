"""POST /v1/rerank and /v1/score: a cross-encoder's scores of pairs of texts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from piecework.engine.text.tokenizer import TextTokens
from piecework.server.context import ServerContext
from piecework.server.encoders.answering import Encoded, check_number, encoded
from piecework.server.errors import invalid
from piecework.server.requests import RerankRequest, ScoreRequest
from piecework.server.responses import (
    Ranked,
    RankedDocument,
    RerankAnswer,
    Score,
    ScoreAnswer,
    encode_responses,
)
from piecework.spec.encoder_config import Task


def rerank_routes(context: ServerContext) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["text"])

    async def scored(request: Request, pairs: list[tuple[str, str]], *, began_s: float) -> Encoded | Response:
        service = context.ready_encoder(Task.SCORE)

        def tokens() -> Sequence[TextTokens]:
            return service.pair_tokens(pairs)

        return await encoded(request, tokens, service=service, context=context, began_s=began_s)

    @router.post("/v1/rerank", response_model=None, responses=encode_responses(RerankAnswer))
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Order documents by how well they answer a query."""
        began_s = time.perf_counter()
        context.check_body(body, request)
        check_number(body.documents, context=context, param="documents")
        documents = [text if isinstance(text, str) else text.text for text in body.documents]
        made = await scored(request, [(body.query, text) for text in documents], began_s=began_s)
        if isinstance(made, Response):
            return made
        scores = made.rows[:, 0].tolist()
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
        results = [_ranked(index, scores[index], documents[index], body) for index in best]
        answer_id = f"rerank-{uuid.uuid4().hex}"
        return RerankAnswer(id=answer_id, model=context.settings.model, results=results, usage=made.usage).to_response()

    @router.post("/v1/score", response_model=None, responses=encode_responses(ScoreAnswer))
    async def score(body: ScoreRequest, request: Request) -> Response:
        """Score pairs of texts."""
        began_s = time.perf_counter()
        context.check_body(body, request)
        pairs = _pairs(body)
        check_number(pairs, context=context, param="text_2")
        made = await scored(request, pairs, began_s=began_s)
        if isinstance(made, Response):
            return made
        return ScoreAnswer(
            id=f"score-{uuid.uuid4().hex}",
            object="list",
            created=int(time.time()),
            model=context.settings.model,
            data=[Score(object="score", index=i, score=s) for i, s in enumerate(made.rows[:, 0].tolist())],
            usage=made.usage,
        ).to_response()

    return router


def _ranked(index: int, score: float, text: str, body: RerankRequest) -> Ranked:
    if body.return_documents is False:
        return Ranked(index=index, relevance_score=score)
    return Ranked(index=index, relevance_score=score, document=RankedDocument(text=text))


def _pairs(body: ScoreRequest) -> list[tuple[str, str]]:
    """Return a request's pairs; raises ApiError where its lists don't have as many texts."""
    first = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise invalid(f"text_2: {len(second)} texts, where text_1 has {len(first)}", param="text_2")
    return list(zip(first, second, strict=True))
