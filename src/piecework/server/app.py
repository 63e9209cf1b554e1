"""The FastAPI application: routes, errors and limits, put together. It knows nothing of models, threads and ports."""

from __future__ import annotations

import itertools

from fastapi import FastAPI

from piecework.foundation.version import VERSION
from piecework.server.chat.chat import chat_routes
from piecework.server.chat.response_bodies import ResponseEvent
from piecework.server.chat.response_routes import response_routes
from piecework.server.completions import completion_routes
from piecework.server.context import Admission, ServerContext
from piecework.server.encoders.embeddings import embedding_routes
from piecework.server.encoders.rerank import rerank_routes
from piecework.server.errors import add_error_answers
from piecework.server.figures.metrics import Metrics
from piecework.server.information import health_routes, model_routes, start_routes
from piecework.server.log import EventLog
from piecework.server.messages.dialect import known_dialects
from piecework.server.middleware import Counted, JsonBody, KeyRequired, KnownHost
from piecework.server.pages.routes import page_routes
from piecework.server.responses import documented_openapi
from piecework.server.settings import ServerSettings
from piecework.server.status import ServerStatus, State
from piecework.server.tokens import token_routes
from piecework.server.unknown_fields import IgnoredNamed, UnknownFields


def make_app(
    status: ServerStatus, settings: ServerSettings, *, log: EventLog | None = None, log_requests: bool = False
) -> FastAPI:
    """Return the application.

    Args:
        status: how far the server is; requests for text are answered once it has a service.
        settings: how to answer.
        log: gets what goes wrong; default: nothing is written.
        log_requests: whether it gets every request as well.
    """
    log = log or EventLog(None)
    metrics = Metrics(status, model=settings.model, names=settings.metrics)
    seeds = None if settings.seed is None else itertools.count(settings.seed)
    dialects = known_dialects(settings.dialect)
    context = ServerContext(
        status, settings, metrics, Admission(settings.limits), log, UnknownFields(log), dialects, seeds
    )
    # FastAPI's own /docs loads its scripts from elsewhere
    app = FastAPI(
        title="piecework",
        version=VERSION,
        summary="OpenAI-compatible text generation and embeddings",
        docs_url=None,
        redoc_url=None,
    )
    for routes in (
        completion_routes,
        chat_routes,
        response_routes,
        embedding_routes,
        rerank_routes,
        model_routes,
        health_routes,
        start_routes,
        token_routes,
    ):
        app.include_router(routes(context))
    app.include_router(page_routes(lambda: app.openapi()))
    add_error_answers(app)
    app.openapi = documented_openapi(app, chunks=(ResponseEvent,), has_key=settings.api_key is not None)  # type: ignore[method-assign]
    # added last, met first
    app.add_middleware(IgnoredNamed)
    app.add_middleware(JsonBody, limits=settings.limits, is_draining=lambda: status.state is State.DRAINING)
    if settings.api_key is not None:
        app.add_middleware(KeyRequired, api_key=settings.api_key)
    if "*" not in settings.hosts:
        app.add_middleware(KnownHost, hosts=settings.hosts)
    app.add_middleware(Counted, metrics=metrics, log=log if log_requests else None)
    return app
