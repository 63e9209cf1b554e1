"""The engine in a thread of its own: any thread or event loop hands requests in and reads tokens.

Between two steps the thread takes the commands that came in: requests, aborts, another model. So an abort frees its
blocks before the next step. What goes wrong in a step is told to everyone who waits for tokens, and ends the engine.
"""

from __future__ import annotations

import asyncio
import atexit
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import final

import torch

from piecework.engine.engine import Engine, Runner
from piecework.engine.mailbox import Mailbox
from piecework.engine.output import Stats, TokenOutput
from piecework.engine.request import GenerationRequest
from piecework.errors import EngineError, PieceworkError
from piecework.foundation.process import release_idle_threads


@dataclass(frozen=True, slots=True)
class _Ended:
    """A request of which nothing more comes: somebody ended it, or `error` says why it can't go on."""

    request_id: str
    error: PieceworkError | None = None


_Item = TokenOutput | _Ended


@dataclass(frozen=True, eq=False)
class _Reader:
    """Where a request's outputs go: `put` is called in the thread of `loop`, or in the engine's where that is None."""

    put: Callable[[_Item], None]
    loop: asyncio.AbstractEventLoop | None = None


@final
class AsyncEngine:
    """Runs an engine's steps, as long as there is work, in a thread that starts at once.

    Args:
        engine: not to be used by anyone else from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._readers: dict[str, _Reader] = {}  # the thread's: by the ids of the requests under way
        # guards what follows; notified when the last request has ended
        self._changed = threading.Condition()
        self._num_requests = 0
        self._draining = False
        self._stopping = False
        self._ended = False
        self._error: BaseException | None = None
        release_idle_threads()  # the calling thread has loaded the model; from now on this one computes
        self._thread = threading.Thread(target=self._serve, name="piecework-engine", daemon=True)
        self._thread.start()
        # a daemon is cut off in the middle of a step when the process ends; this lets it finish the step first
        atexit.register(self._stop)

    @property
    def error(self) -> BaseException | None:
        """What ended the engine, if something did."""
        return self._error

    @property
    def max_length(self) -> int:
        """The longest sequence, prompt and continuation together, in tokens."""
        return self._engine.max_length

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError or CapacityError where a request could never run. Any thread may call it."""
        self._engine.check(request)

    def stats(self) -> Stats:
        """Return what the engine is doing. Any thread may call it."""
        return self._engine.stats()

    async def stream(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """Yield a request's tokens as they come, those of its continuations interleaved.

        Whoever stops iterating, by cancellation or `aclose`, ends the request.

        Raises RequestError or CapacityError where it can't run, EngineError where the engine ends before it does.
        """
        received: asyncio.Queue[_Item] = asyncio.Queue()
        self._submit(request, _Reader(received.put_nowait, asyncio.get_running_loop()))
        over = False
        try:
            while not over:
                item = await received.get()
                over = _ends(item)
                if isinstance(item, TokenOutput):
                    yield item
                elif item.error is not None:
                    raise item.error
        finally:
            if not over:
                self.abort(request.request_id)

    def run(self, requests: Sequence[GenerationRequest]) -> Iterator[TokenOutput]:
        """Yield the tokens of several requests, in batches (`Mailbox`); blocks the calling thread meanwhile.

        Whoever stops iterating ends the requests. Raises like `stream`; the first error ends all of them.
        """
        received: Mailbox[_Item] = Mailbox()

        def put(item: _Item) -> None:
            (received.put_urgent if _ends(item) else received.put)(item)

        under_way: set[str] = set()
        try:
            for request in requests:
                # whoever looks for stop strings ends requests by them, and so is told of every token at once
                self._submit(request, _Reader(received.put_urgent if request.params.stop else put))
                under_way.add(request.request_id)
            while under_way:
                for item in received.wait():
                    if _ends(item):
                        under_way.discard(item.request_id)
                    if isinstance(item, TokenOutput):
                        yield item
                    elif item.error is not None:
                        raise item.error
        finally:
            for request_id in under_way:
                self.abort(request_id)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its continuations, before the next step. One that has ended already is no error."""
        self._command(lambda: self._abort(request_id, index), or_else=lambda: None)

    def swap_runner(self, runner: Runner) -> None:
        """Go on with another model of the same shapes from the next step; see `Engine.swap_runner`.

        Blocks until it is done: not for an event loop's thread. Raises what allocating the KV caches raises, which ends
        the engine.
        """
        done: Future[None] = Future()

        def command() -> None:
            if self._stopping:
                done.set_exception(self._stopped())
                return
            try:
                self._engine.swap_runner(runner)
            except BaseException as error:
                done.set_exception(error)
                raise
            done.set_result(None)

        self._command(command, or_else=lambda: done.set_exception(self._stopped()))
        done.result()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests, and wait for those under way; returns whether all of them ended in time."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._num_requests, timeout_s)

    def close(self) -> None:
        """End at once, after the step that runs: requests under way get an EngineError, the model is closed."""
        self._stop()
        atexit.unregister(self._stop)
        self._engine.close()

    def _stop(self) -> None:
        with self._changed:
            self._stopping = True
        self._commands.put(lambda: None)
        self._thread.join()

    def _submit(self, request: GenerationRequest, reader: _Reader) -> None:
        with self._changed:
            if self._ended or self._draining or self._stopping:
                raise self._stopped()
            self._num_requests += 1
            self._commands.put(lambda: self._add(request, reader))

    def _command(self, command: Callable[[], None], *, or_else: Callable[[], None]) -> None:
        """Have the thread call `command` between two steps; where it has ended already, call `or_else` here."""
        with self._changed:
            if not self._ended:
                self._commands.put(command)
                return
        or_else()

    # what follows runs in the thread

    def _serve(self) -> None:
        torch.get_num_threads()  # tells this thread's OpenMP, which our code asks, what another thread has set
        try:
            while True:
                self._obey()
                if self._stopping:
                    break
                if self._engine.has_work:
                    self._deliver(self._engine.step())
        except BaseException as error:  # noqa: BLE001  kept, and told to everyone who waits
            self._error = error
        finally:
            self._end()

    def _obey(self) -> None:
        """Take the commands that came in; wait for one where there is nothing else to do."""
        if not self._engine.has_work:
            self._commands.get()()
        while not self._stopping:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _add(self, request: GenerationRequest, reader: _Reader) -> None:
        try:
            self._engine.add(request)
        except PieceworkError as error:
            _tell(reader, [(reader, _Ended(request.request_id, error))])
            self._close_one()
            return
        self._readers[request.request_id] = reader

    def _abort(self, request_id: str, index: int | None) -> None:
        if self._engine.abort(request_id, index) and not self._engine.is_open(request_id):
            reader = self._readers[request_id]
            _tell(reader, [(reader, _Ended(request_id))])
            self._end_request(request_id)

    def _deliver(self, outputs: Sequence[TokenOutput]) -> None:
        """Hand the outputs of a step to their readers, with one call for each event loop."""
        of_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Reader, _Item]]] = {}
        for output in outputs:
            reader = self._readers[output.request_id]
            if reader.loop is None:
                reader.put(output)
            else:
                of_loop.setdefault(reader.loop, []).append((reader, output))
            if output.ends_request:
                self._end_request(output.request_id)
        for items in of_loop.values():
            if not _tell(items[0][0], items):
                for _, item in items:  # the loop is closed, so nobody will read them
                    assert isinstance(item, TokenOutput)
                    self._abort(item.request_id, None)

    def _end_request(self, request_id: str) -> None:
        del self._readers[request_id]
        self._close_one()

    def _close_one(self) -> None:
        with self._changed:
            self._num_requests -= 1
            if not self._num_requests:
                self._changed.notify_all()

    def _end(self) -> None:
        """Tell everyone who still waits; nothing can come in any more afterwards."""
        with self._changed:
            self._ended = self._stopping = True
        while True:
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                break
        for request_id, reader in self._readers.items():
            _tell(reader, [(reader, _Ended(request_id, self._stopped()))])
        self._readers.clear()
        with self._changed:
            self._num_requests = 0
            self._changed.notify_all()

    def _stopped(self) -> EngineError:
        """Return a new error that says why the engine doesn't go on."""
        cause = self._error
        if cause is None:
            found = "the engine was closed" if self._stopping else "the engine takes no more requests"
            return EngineError(asked="generate text", found=found, try_="start another engine")
        error = EngineError(
            asked="generate text",
            found=f"a step of the engine failed: {type(cause).__name__}: {cause}",
            try_="start it again; if that repeats, report it with the traceback",
        )
        error.__cause__ = cause
        return error


def _ends(item: _Item) -> bool:
    """Return whether nothing more comes of the item's request."""
    return not isinstance(item, TokenOutput) or item.ends_request


def _tell(reader: _Reader, items: Sequence[tuple[_Reader, _Item]]) -> bool:
    """Put items to readers of the same loop as `reader`; returns False where that loop is closed."""
    if reader.loop is None:
        _put_all(items)
        return True
    try:
        reader.loop.call_soon_threadsafe(_put_all, items)
    except RuntimeError:
        return False
    return True


def _put_all(items: Sequence[tuple[_Reader, _Item]]) -> None:
    for reader, item in items:
        reader.put(item)
