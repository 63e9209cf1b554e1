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

from piecework.engine.engine import Engine, EngineStats, Runner, TokenOutput
from piecework.engine.mailbox import Mailbox
from piecework.engine.request import GenerationRequest, SequenceKey
from piecework.errors import EngineError, PieceworkError
from piecework.foundation.process import release_idle_threads


@dataclass(frozen=True, slots=True)
class _Aborted:
    """A continuation that ended without a last token."""

    request_id: str
    index: int


@dataclass(frozen=True, slots=True)
class _Failed:
    """A request that was refused, or can't go on."""

    request_id: str
    error: PieceworkError


_Item = TokenOutput | _Aborted | _Failed


@dataclass(frozen=True, eq=False)
class _Reader:
    """Where a request's outputs go: `put` is called in the thread of `loop`, or in the engine's where that is None."""

    put: Callable[[_Item], None]
    loop: asyncio.AbstractEventLoop | None = None


@dataclass(eq=False)
class _Request:
    """A request under way: who reads it, and which of its continuations go on."""

    reader: _Reader
    open: set[int]


@final
class AsyncEngine:
    """Runs an engine's steps, as long as there is work, in a thread that starts at once.

    Args:
        engine: not to be used by anyone else from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._requests: dict[str, _Request] = {}  # the thread's
        self._paused = False  # the thread's
        # guards what follows; notified when the last request has ended
        self._changed = threading.Condition()
        self._num_open = 0
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

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError or CapacityError where a request could never run. Any thread may call it."""
        self._engine.check(request)

    def stats(self) -> EngineStats:
        """Return what the engine is doing. Any thread may call it."""
        return self._engine.stats()

    async def stream(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """Yield a request's tokens as they come, those of its continuations interleaved.

        Whoever stops iterating, by cancellation or `aclose`, ends the request.

        Raises RequestError or CapacityError where it can't run, EngineError where the engine ends before it does.
        """
        received: asyncio.Queue[_Item] = asyncio.Queue()
        self._submit(request, _Reader(received.put_nowait, asyncio.get_running_loop()))
        num_open = request.params.n
        try:
            while num_open:
                item = await received.get()
                if isinstance(item, _Failed):
                    num_open = 0
                    raise item.error
                if isinstance(item, _Aborted):
                    num_open -= 1
                    continue
                if item.finish_reason is not None:
                    num_open -= 1
                yield item
        finally:
            if num_open:
                self.abort(request.request_id)

    def run(self, requests: Sequence[GenerationRequest]) -> Iterator[TokenOutput]:
        """Yield the tokens of several requests, in batches (`Mailbox`); blocks the calling thread meanwhile.

        Whoever stops iterating ends the requests. Raises like `stream`; the first error ends all of them.
        """
        received: Mailbox[_Item] = Mailbox()

        def put(item: _Item) -> None:
            ends = not isinstance(item, TokenOutput) or item.finish_reason is not None
            (received.put_urgent if ends else received.put)(item)

        open_: set[SequenceKey] = set()
        try:
            for request in requests:
                # whoever looks for stop strings ends requests by them, and so is told of every token at once
                self._submit(request, _Reader(received.put_urgent if request.params.stop else put))
                open_.update((request.request_id, index) for index in range(request.params.n))
            while open_:
                for item in received.wait():
                    if isinstance(item, _Failed):
                        open_ = {key for key in open_ if key[0] != item.request_id}
                        raise item.error
                    if isinstance(item, _Aborted):
                        open_.discard((item.request_id, item.index))
                        continue
                    if item.finish_reason is not None:
                        open_.discard((item.request_id, item.index))
                    yield item
        finally:
            for request_id in {key[0] for key in open_}:
                self.abort(request_id)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its continuations, before the next step. One that has ended already is no error."""
        self._command(lambda: self._abort(request_id, index), or_else=lambda: None)

    def pause(self) -> None:
        """Return once the step that runs has ended; no other begins before `resume`."""
        self._call(lambda: self._set_paused(True))

    def resume(self) -> None:
        """Go on after `pause`."""
        self._call(lambda: self._set_paused(False))

    def swap_runner(self, runner: Runner) -> None:
        """Go on with another model of the same shapes from the next step; see `Engine.swap_runner`.

        Blocks until it is done: not for an event loop's thread. Raises what allocating the KV caches raises, which ends
        the engine.
        """
        self._call(lambda: self._engine.swap_runner(runner), fatal=True)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests, and wait for those under way; returns whether all of them ended in time."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._num_open, timeout_s)

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
            self._num_open += 1
            self._commands.put(lambda: self._add(request, reader))

    def _command(self, command: Callable[[], None], *, or_else: Callable[[], None]) -> None:
        """Have the thread call `command` between two steps; where it has ended already, call `or_else` here."""
        with self._changed:
            if not self._ended:
                self._commands.put(command)
                return
        or_else()

    def _call(self, function: Callable[[], None], *, fatal: bool = False) -> None:
        """Have the thread call `function` between two steps, and wait; with `fatal`, its error ends the engine."""
        done: Future[None] = Future()

        def command() -> None:
            if self._stopping:
                done.set_exception(self._stopped())
                return
            try:
                function()
            except BaseException as error:
                done.set_exception(error)
                if fatal:
                    raise
            else:
                done.set_result(None)

        self._command(command, or_else=lambda: done.set_exception(self._stopped()))
        done.result()

    # what follows runs in the thread

    def _serve(self) -> None:
        try:
            while True:
                self._obey()
                if self._stopping:
                    break
                if self._engine.has_work and not self._paused:
                    self._deliver(self._engine.step())
        except BaseException as error:  # noqa: BLE001  kept, and told to everyone who waits
            self._error = error
        finally:
            self._end()

    def _obey(self) -> None:
        """Take the commands that came in; wait for one where there is nothing else to do."""
        if self._paused or not self._engine.has_work:
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
            _tell(reader, [(reader, _Failed(request.request_id, error))])
            self._close_one()
            return
        self._requests[request.request_id] = _Request(reader, set(range(request.params.n)))

    def _abort(self, request_id: str, index: int | None) -> None:
        known = self._requests.get(request_id)
        if known is None:
            return
        self._engine.abort(request_id, index)
        ended = [at for at in known.open if index in (None, at)]
        _tell(known.reader, [(known.reader, _Aborted(request_id, at)) for at in ended])
        for at in ended:
            self._end_one(request_id, at)

    def _deliver(self, outputs: Sequence[TokenOutput]) -> None:
        """Hand the outputs of a step to their readers, with one call for each event loop."""
        of_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Reader, _Item]]] = {}
        for output in outputs:
            reader = self._requests[output.request_id].reader
            if reader.loop is None:
                reader.put(output)
            else:
                of_loop.setdefault(reader.loop, []).append((reader, output))
            if output.finish_reason is not None:
                self._end_one(output.request_id, output.index)
        for items in of_loop.values():
            if not _tell(items[0][0], items):
                for _, item in items:  # the loop is closed, so nobody will read them
                    assert isinstance(item, TokenOutput)
                    self._abort(item.request_id, None)

    def _end_one(self, request_id: str, index: int) -> None:
        known = self._requests[request_id]
        known.open.discard(index)
        if not known.open:
            del self._requests[request_id]
            self._close_one()

    def _close_one(self) -> None:
        with self._changed:
            self._num_open -= 1
            if not self._num_open:
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
        for request_id, known in self._requests.items():
            _tell(known.reader, [(known.reader, _Failed(request_id, self._stopped()))])
        self._requests.clear()
        with self._changed:
            self._num_open = 0
            self._changed.notify_all()

    def _set_paused(self, paused: bool) -> None:  # noqa: FBT001
        self._paused = paused

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
