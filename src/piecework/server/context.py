"""What every route of one server shares, and how many requests may generate at a time. Made once per app."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, cast, final

from starlette.requests import Request

from piecework.engine.request import GenerationRequest
from piecework.server.errors import ApiError, invalid
from piecework.server.figures.metrics import Metrics
from piecework.server.log import EventLog
from piecework.server.messages.dialect import Dialect, find_dialect
from piecework.server.requests import DetokenizeRequest, NamedBody, TokenizeRequest
from piecework.server.service import AnyService, EncodeService, Service
from piecework.server.settings import Limits, ServerSettings
from piecework.server.status import ServerStatus, State
from piecework.server.unknown_fields import UnknownFields
from piecework.spec.encoder_config import Task

_DOES: Final = {
    Task.GENERATE: "continues texts: POST /v1/completions or /v1/chat/completions",
    Task.EMBED: "embeds texts: POST /v1/embeddings",
    Task.SCORE: "scores pairs of texts: POST /v1/rerank or /v1/score",
}


@dataclass(frozen=True)
class ServerContext:
    """The parts of a running server."""

    status: ServerStatus
    settings: ServerSettings
    metrics: Metrics
    admission: Admission
    log: EventLog
    unknown: UnknownFields
    dialects: tuple[Dialect, ...]
    seeds: Iterator[int] | None = None

    def dialect(self, service: Service) -> Dialect | None:
        """Return how the model writes calls and reasoning, where that is known."""
        return find_dialect(self.dialects, service.chat_templates)

    def seeded(self, request: GenerationRequest) -> GenerationRequest:
        """Return a request with a seed of its own, where the server was given one and the client gave none."""
        if self.seeds is None or request.params.seed is not None:
            return request
        return replace(request, params=replace(request.params, seed=next(self.seeds)))

    def check_body(self, body: NamedBody | TokenizeRequest | DetokenizeRequest, request: Request) -> None:
        """Raise ApiError 404 for another model's name, 400 for unknown fields that would change the answer."""
        if body.model is not None:
            self.check_model(body.model)
        self.unknown.check(body, request)

    def ready_service(self) -> Service:
        """Return what generates; raises ApiError as `ready_encoder`."""
        return cast("Service", self._ready(Task.GENERATE))

    def ready_encoder(self, task: Task) -> EncodeService:
        """Return what embeds texts or scores pairs of them.

        Raises ApiError 503, with Retry-After, while nothing does, and 400 where the model does something else.
        """
        return cast("EncodeService", self._ready(task))

    def _ready(self, task: Task) -> AnyService:
        status = self.status
        state = status.state
        if state is State.FAILED:
            raise ApiError(503, f"the model doesn't run: {status.failure}", code="failed")
        if status.service is not None and state is not State.DRAINING:
            if status.service.task is not task:
                raise invalid(f"this server's model {_DOES[status.service.task]}", param="model", code="wrong_task")
            return status.service
        seconds = self.settings.limits.retry_after_s
        why = {
            State.STARTING: "the model is being loaded",
            State.COMPILING: "the model is being compiled",
            State.DRAINING: "the server is shutting down",
        }.get(state, "the model is not ready")
        raise ApiError(503, why, code=state.value, headers={"Retry-After": str(seconds)})

    def check_model(self, name: str) -> None:
        """Raise ApiError 404 unless the model is served under this name."""
        if name not in self.settings.model_names:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {', '.join(self.settings.model_names)}",
                param="model",
                code="model_not_found",
            )


@final
class Admission:
    """Counts the requests that generate, and refuses one too many. Used from the event loop only."""

    def __init__(self, limits: Limits) -> None:
        self._most = limits.concurrent_requests
        self._retry_after_s = limits.retry_after_s
        self._running = 0

    @property
    def running(self) -> int:
        """Requests that were admitted and haven't ended."""
        return self._running

    def admit(self) -> Ticket:
        """Return a ticket to release when the request ends; raises ApiError 429 where there are too many."""
        if self._running >= self._most:
            raise ApiError(
                429,
                f"{self._running} requests are running, which is this server's most",
                headers={"Retry-After": str(self._retry_after_s)},
            )
        self._running += 1
        return Ticket(self)

    def _release(self) -> None:
        self._running -= 1


@final
class Ticket:
    """The place of one request among those that run. Releasing it twice is the same as once."""

    def __init__(self, admission: Admission) -> None:
        self._admission: Admission | None = admission

    def release(self) -> None:
        """Give the place back."""
        if self._admission is not None:
            self._admission._release()
            self._admission = None
