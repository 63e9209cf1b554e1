"""What the server says of itself: models, health, its version, figures, the bundle, and how the start went."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from piecework.foundation.version import VERSION
from piecework.server.context import ServerContext
from piecework.server.errors import ApiError
from piecework.server.figures.metrics import CONTENT_TYPE
from piecework.server.responses import (
    BundleAnswer,
    Health,
    Model,
    ModelList,
    PhaseTimes,
    StatusAnswer,
    Version,
    error_responses,
)
from piecework.server.status import State


def model_routes(context: ServerContext) -> APIRouter:
    """Return the routes that OpenAI's clients know: the models that are served."""
    router = APIRouter()
    created = int(time.time())

    def model(name: str) -> Model:
        service = context.status.service
        longest = None if service is None else service.max_positions
        return Model(id=name, object="model", created=created, owned_by="piecework", max_model_len=longest)

    @router.get("/v1/models", response_model=None, responses={200: {"model": ModelList}, **error_responses(401)})
    async def list_models() -> Response:
        """List the names under which the model is served."""
        return ModelList(object="list", data=[model(name) for name in context.settings.model_names]).to_response()

    @router.get(
        "/v1/models/{name:path}", response_model=None, responses={200: {"model": Model}, **error_responses(401, 404)}
    )
    async def get_model(name: str) -> Response:
        """Say whether a model is served."""
        context.check_model(name)
        return model(name).to_response()

    return router


def health_routes(context: ServerContext) -> APIRouter:
    """Return the routes for whatever watches the server: health and figures."""
    router = APIRouter()
    status, settings = context.status, context.settings

    @router.get("/health", response_model=None, responses={200: {"model": Health}, 503: {"model": Health}})
    async def health() -> Response:
        """200 where requests for text are answered, else 503."""
        state, failure = status.state, status.failure
        able = status.service is not None and state in (State.READY, State.COMPILING)
        if not able:
            retry = {"Retry-After": str(settings.limits.retry_after_s)}
            return Health(status=state, message=failure).to_response(status=503, headers=retry)
        if status.bundle is None:
            return Health(status=state, message=failure).to_response()
        return Health(status=state, message=failure, serving=status.bundle.backend).to_response()

    @router.get("/version", response_model=None, responses={200: {"model": Version}})
    async def version() -> Response:
        """Say which version of piecework this is."""
        return Version(version=VERSION).to_response()

    @router.get("/ping", response_model=None, responses={200: {"model": Health}, 503: {"model": Health}})
    async def ping() -> Response:
        """The same as /health, under the name that load balancers use."""
        return await health()

    @router.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses={200: {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}}, "description": "The figures."}},
    )
    async def metrics(request: Request) -> Response:
        """Figures for Prometheus; as OpenMetrics where `Accept` says so."""
        text, kind = context.metrics.text(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": kind})

    return router


def start_routes(context: ServerContext) -> APIRouter:
    """Return the routes that are piecework's own: the bundle that runs, and how the start went."""
    router = APIRouter()
    status, settings = context.status, context.settings

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
        report = await asyncio.to_thread(status.bundle.report)
        return BundleAnswer.model_validate(report).to_response()

    @router.get(
        "/v1/piecework/status", response_model=None, responses={200: {"model": StatusAnswer}, **error_responses(401)}
    )
    async def server_status() -> Response:
        """How the start went, what is being compiled, and what the engine is doing."""
        return _status_answer(context).to_response()

    return router


def _status_answer(context: ServerContext) -> StatusAnswer:
    status, service = context.status, context.status.service
    first = status.first_token_s
    return StatusAnswer(
        model=context.settings.model,
        version=VERSION,
        state=status.state,
        serving=status.serving,
        uptime_s=round(status.uptime_s, 3),
        first_token_s=None if first is None else round(first, 3),
        phases=[
            PhaseTimes(
                name=phase.name,
                begin_s=round(phase.begin_s, 4),
                end_s=None if phase.end_s is None else round(phase.end_s, 4),
            )
            for phase in status.phases
        ],
        compile=status.compiling,
        failure=status.failure,
        bundle_hit=None if status.bundle is None else status.bundle.hit,
        max_positions=None if service is None else service.max_positions,
        task=None if service is None else service.task,
        engine=None if service is None else service.stats(),
    )
