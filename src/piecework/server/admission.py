"""How many requests may generate at the same time."""

from __future__ import annotations

from typing import final

from piecework.server.errors import ApiError
from piecework.server.settings import Limits


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
