"""POST /v1/embeddings: a vector for each text."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any, cast

from fastapi import APIRouter, Request, Response

from piecework.engine.encoding.encode_engine import shortened
from piecework.engine.text.tokenizer import TextTokens
from piecework.server.context import ServerContext
from piecework.server.encoders.answering import check_number, encoded
from piecework.server.errors import invalid
from piecework.server.requests import EmbeddingRequest
from piecework.server.responses import Embedding, EmbeddingAnswer, encode_responses
from piecework.server.service import EncodeService
from piecework.spec.encoder_config import Task


def embedding_routes(context: ServerContext) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["text"])

    @router.post("/v1/embeddings", response_model=None, responses=encode_responses(EmbeddingAnswer))
    async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Embed one text or several."""
        began_s = time.perf_counter()
        context.check_body(body, request)
        service = context.ready_encoder(Task.EMBED)
        texts = _texts(body)
        check_number(texts, context=context, param="input")

        def tokens() -> Sequence[TextTokens]:
            return _tokens(body, texts, service=service)

        made = await encoded(request, tokens, service=service, context=context, began_s=began_s)
        if isinstance(made, Response):
            return made
        vectors = shortened(made.rows, body.dimensions)
        as_bytes = body.encoding_format == "base64"
        data = [
            Embedding(
                object="embedding",
                index=index,
                embedding=base64.b64encode(row.astype("<f4").tobytes()).decode() if as_bytes else row.tolist(),
            )
            for index, row in enumerate(vectors)
        ]
        return EmbeddingAnswer(object="list", model=context.settings.model, data=data, usage=made.usage).to_response()

    return router


def _texts(body: EmbeddingRequest) -> list[Any]:
    """Return a request's texts: all strings, or all lists of tokens."""
    given = body.input
    return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)


def _tokens(body: EmbeddingRequest, texts: list[Any], *, service: EncodeService) -> Sequence[TextTokens]:
    """Return the tokens of texts; raises ApiError where one is empty, or too long and not to be cut off."""
    if isinstance(texts[0], str):
        if "" in texts:
            raise invalid("input: a text is empty", param="input")
        tokens = service.tokens(cast("list[str]", texts))
    else:
        tokens = [TextTokens(ids, [0] * len(ids)) for ids in texts]
    most = service.max_positions
    if body.truncate_prompt_tokens is not None:
        return [TextTokens(text.ids[:most], text.types[:most]) for text in tokens]
    for index, text in enumerate(tokens):
        if text.cut or len(text.ids) > most:
            raise invalid(
                f"input: text {index} has more tokens than this model's {most}; truncate_prompt_tokens -1 cuts it off",
                param="input",
                code="context_length_exceeded",
            )
    return tokens
