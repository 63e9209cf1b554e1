"""What every route of one server shares. Made once per app and passed on; nothing here is global."""

from __future__ import annotations

from dataclasses import dataclass

from piecework.server.admission import Admission
from piecework.server.errors import ApiError
from piecework.server.log import EventLog
from piecework.server.metrics import Metrics
from piecework.server.service import Service
from piecework.server.settings import ServerSettings
from piecework.server.status import ServerStatus, State


@dataclass(frozen=True)
class ServerContext:
    """The parts of a running server."""

    status: ServerStatus
    settings: ServerSettings
    metrics: Metrics
    admission: Admission
    log: EventLog

    def ready_service(self) -> Service:
        """Return what generates; raises ApiError 503, with Retry-After, while nothing does."""
        status = self.status
        state = status.state
        if state is State.FAILED:
            raise ApiError(503, f"the model doesn't run: {status.failure}", code="failed")
        if status.service is not None and state is not State.DRAINING:
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
