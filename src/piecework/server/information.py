"""What the server says of itself: models, health, figures, the bundle, how the start went."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from piecework.foundation.version import VERSION
from piecework.server.context import ServerContext
from piecework.server.documented import error_responses
from piecework.server.errors import ApiError
from piecework.server.metrics import CONTENT_TYPE
from piecework.server.responses import BundleAnswer, Health, Model, ModelList, StatusAnswer
from piecework.server.status import State


def information_routes(context: ServerContext) -> APIRouter:
    """Return the routes."""
    router = APIRouter()
    status, settings = context.status, context.settings
    created = int(time.time())

    def model(name: str) -> dict[str, Any]:
        service = status.service
        longest = None if service is None else service.max_positions
        return {"id": name, "object": "model", "created": created, "owned_by": "piecework", "max_model_len": longest}

    @router.get("/v1/models", response_model=None, responses={200: {"model": ModelList}, **error_responses(401)})
    async def list_models() -> Response:
        """List the names under which the model is served."""
        return JSONResponse({"object": "list", "data": [model(name) for name in settings.model_names]})

    @router.get(
        "/v1/models/{name:path}", response_model=None, responses={200: {"model": Model}, **error_responses(401, 404)}
    )
    async def get_model(name: str) -> Response:
        """Say whether a model is served."""
        context.check_model(name)
        return JSONResponse(model(name))

    @router.get("/health", response_model=None, responses={200: {"model": Health}, 503: {"model": Health}})
    async def health() -> Response:
        """200 where requests for text are answered, else 503."""
        able = status.service is not None and status.state in (State.READY, State.COMPILING)
        answer: dict[str, Any] = {"status": status.state.value, "message": status.failure}
        if able and status.bundle is not None:
            answer["serving"] = status.bundle.backend
        headers = {} if able else {"Retry-After": str(settings.limits.retry_after_s)}
        return JSONResponse(answer, status_code=200 if able else 503, headers=headers)

    @router.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses={200: {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}}, "description": "The figures."}},
    )
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(context.metrics.text(), media_type=CONTENT_TYPE)

    @router.get(
        "/v1/piecework/bundle",
        response_model=None,
        responses={200: {"model": BundleAnswer}, **error_responses(401, 503)},
    )
    async def bundle() -> Response:
        """What is in the bundle that runs, as `piecework inspect --json` shows it."""
        if status.bundle is None:
            retry = {"Retry-After": str(settings.limits.retry_after_s)}
            raise ApiError(503, "no bundle is loaded yet", code=status.state.value, headers=retry)
        return JSONResponse(await asyncio.to_thread(status.bundle.report))

    @router.get(
        "/v1/piecework/status", response_model=None, responses={200: {"model": StatusAnswer}, **error_responses(401)}
    )
    async def server_status() -> Response:
        """How the start went, what is being compiled, and what the engine is doing."""
        service = status.service
        return JSONResponse(
            {
                "model": settings.model,
                "version": VERSION,
                **status.to_json(),
                "max_positions": None if service is None else service.max_positions,
                "engine": None if service is None else asdict(service.stats()),
            }
        )

    return router
