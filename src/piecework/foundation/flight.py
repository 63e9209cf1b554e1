"""Single flight: of all processes that miss a key, one makes it and the others wait for it, but never for ever.

One that dies is replaced by another. One that hangs is reported, and overtaken after a time: another makes the same.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, final

from piecework.foundation.leases import BEAT_S, Holder, Lease

_LOG = logging.getLogger("piecework")
REPORT_S: Final = 60.0
"""What takes so long without progress is reported; again after twice that time, and so on."""
OVERTAKE_S: Final = 600.0
"""After so long without progress of another process, its work is done here; see `Environment.overtake_s`."""
_POLL_S: Final = (0.02, 0.25)


class Take(Protocol):
    """Takes the lease of a key without waiting, or returns who has it; see `leases.take`."""

    def __call__(self, key: str, *, over: Holder | None = None) -> Lease | Holder:
        """Take it. Raises StoreError, OSError."""


@dataclass
class _Wait:
    """Waiting for one process: for which keys, since when, and after how long that is reported next."""

    holder: Holder
    keys: set[str]
    since: float
    report_s: float


@final
class Flight:
    """The keys that this process is making; a context, at whose end it makes none any more.

    Args:
        take: takes a key's lease.
        overtake_s: how long to wait for a process that makes no progress, in seconds.
        report_s: after how long such a process is reported.
    """

    def __init__(self, take: Take, *, overtake_s: float, report_s: float = REPORT_S) -> None:
        self._take = take
        self._overtake_s = overtake_s
        self._report_s = report_s
        self._leases: dict[str, Lease] = {}
        self._waits: dict[tuple[int, str], _Wait] = {}
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._renewing: threading.Thread | None = None

    def __enter__(self) -> Flight:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def rounds(self, keys: Iterable[str], *, is_made: Callable[[str], bool]) -> Iterator[list[str]]:
        """Yield keys that this process is to make now, until each has been made, here or by others.

        Args:
            keys: what is needed.
            is_made: whether a key has been made; asked again and again, by no two threads at a time.

        Before it goes on, the caller makes all that it was given, and calls `landed` for each as soon as others can
        have it. What it can't make counts as done. `end`, from another thread, ends the waiting.
        """
        waiting, pause_s = list(keys), _POLL_S[0]
        while waiting and not self._ended.is_set():
            before = len(waiting)
            held: dict[str, Holder] = {}
            led = []
            for key in [key for key in waiting if not is_made(key)]:
                holder = self._lead(key)
                if holder is not None:
                    held[key] = holder
                elif is_made(key):  # somebody was just done with it
                    self.landed(key)
                else:
                    led.append(key)
            if led:
                yield led
                for key in led:
                    self.landed(key)
            waiting = list(held)
            if waiting and not led:
                self._watch(held)
                pause_s = _POLL_S[0] if len(waiting) < before else min(1.5 * pause_s, _POLL_S[1])
                self._ended.wait(pause_s)

    def landed(self, key: str) -> None:
        """Let others have what was made under a key, or make it where it wasn't; does nothing the second time."""
        with self._mutex:
            lease = self._leases.pop(key, None)
        if lease is not None:
            lease.release()

    def end(self) -> None:
        """Make nothing any more, and wait for nothing."""
        self._ended.set()
        for key in list(self._leases):
            self.landed(key)

    def _lead(self, key: str) -> Holder | None:
        """Take a key's lease, also from a process that has had its time, or return who has it."""
        taken = self._take(key)
        if isinstance(taken, Holder):
            wait = self._waits.get(_owner(taken))
            if wait is None or key not in wait.keys or time.monotonic() - wait.since < self._overtake_s:
                return taken
            _LOG.warning("doing here what %s is not done with after %.0f s", taken, time.monotonic() - wait.since)
            taken = self._take(key, over=taken)
            if isinstance(taken, Holder):
                return taken
        with self._mutex:
            self._leases[key] = taken
        if self._renewing is None:
            self._renewing = threading.Thread(target=self._renew, name="piecework-leases", daemon=True)
            self._renewing.start()
        return None

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_S):
            with self._mutex:
                for lease in self._leases.values():
                    lease.renew()

    def _watch(self, held: Mapping[str, Holder]) -> None:
        """Report processes that have made no progress for long."""
        now = time.monotonic()
        keys: dict[tuple[int, str], set[str]] = {}
        for key, holder in held.items():
            keys.setdefault(_owner(holder), set()).add(key)
            self._waits.setdefault(_owner(holder), _Wait(holder, set(), now, self._report_s))
        for owner, wait in list(self._waits.items()):
            still = keys.get(owner, set())
            if not wait.keys <= still:  # it is done with one of them
                wait.since, wait.report_s = now, self._report_s
            wait.keys = still
            if not still:
                del self._waits[owner]
            elif now - wait.since >= wait.report_s:
                wait.report_s *= 2
                _LOG.warning(
                    "waiting for %s, which has been compiling what is needed here for %.0f s; after %.0f s without "
                    "progress (PIECEWORK_OVERTAKE_S) it is compiled here",
                    wait.holder,
                    now - wait.since,
                    self._overtake_s,
                )


@contextlib.contextmanager
def leading(key: str, take: Take, *, is_made: Callable[[], bool], overtake_s: float) -> Iterator[bool]:
    """Give True to the one process that is to make something, and False, once it is made, to all others."""
    with Flight(take, overtake_s=overtake_s) as flight:
        yield any(True for _ in flight.rounds([key], is_made=lambda _: is_made()))


def _owner(holder: Holder) -> tuple[int, str]:
    return holder.pid, holder.kernel
