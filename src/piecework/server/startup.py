"""Bring a model up beside the HTTP server, which says how far it is and serves as soon as something runs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, final

from piecework.engine.compile_process import CompileProcess
from piecework.engine.encoding.opening import open_encoder
from piecework.engine.events import (
    BundleMissing,
    CompileBegins,
    CompileEnds,
    CompileGoesOn,
    Note,
    Phase,
    StartEvent,
    phase,
)
from piecework.engine.opening import Opened, open_compiled, open_engine
from piecework.engine.options import EngineOptions
from piecework.errors import PieceworkError
from piecework.foundation.environment import Environment
from piecework.report.inspect import describe
from piecework.server.log import EventLog
from piecework.server.status import BundleUse, ServerStatus, State
from piecework.spec.encoder_config import Task
from piecework.spec.model_spec import ModelSpec

if TYPE_CHECKING:
    from piecework.engine.async_engine import AsyncEngine
    from piecework.engine.encoding.encode_engine import EncodeEngine
    from piecework.engine.text.tokenizer import Tokenizer
    from piecework.server.service import AnyService

    _Engine = AsyncEngine | EncodeEngine

_STOP_S: Final = 10.0


@final
class ModelStart:
    """Brings one model up, in threads of its own.

    Args:
        spec: which model, compiled how.
        options: the engine's.
        environment: where the store is.
        status: is told how far it is, and gets the service.
        log: is told what happens.
        failed: is set where the model can't be served; the error is in `error` then.
    """

    def __init__(
        self,
        spec: ModelSpec,
        options: EngineOptions,
        *,
        environment: Environment,
        status: ServerStatus,
        log: EventLog,
        failed: threading.Event,
    ) -> None:
        self._spec = spec
        self._options = options
        self._environment = environment
        self._status = status
        self._log = log
        self._failed = failed
        self._thread = threading.Thread(target=self._run, name="piecework-start", daemon=True)
        self._mutex = threading.Lock()
        self._process: CompileProcess | None = None
        self._engine: _Engine | None = None
        self._stopped = False
        self.error: Exception | None = None

    def begin(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """End the compile and the engine, if there are any."""
        with self._mutex:
            self._stopped = True
            process, engine = self._process, self._engine
        if process is not None:
            process.stop()
        if engine is not None:
            engine.close()
        self._thread.join(_STOP_S)  # it may be reading weights, which can't be interrupted

    @property
    def _ending(self) -> bool:
        """Whether a failure is of no interest any more; Ctrl-C ends a compile together with the server."""
        return self._stopped or self._status.state is State.DRAINING

    def _run(self) -> None:
        try:
            self._bring_up()
        except Exception as error:  # noqa: BLE001 - the thread's edge: the command that started it raises it
            if self._ending:
                return
            self.error = error
            self._status.fails(str(error))
            self._failed.set()

    def _bring_up(self) -> None:
        if self._spec.config.task is Task.GENERATE:
            self._bring_up_engine()
        else:
            self._bring_up_encoder()

    def _bring_up_engine(self) -> None:
        opened = open_engine(
            self._spec,
            self._options,
            environment=self._environment,
            tokenizer=self._load_tokenizer,
            on_event=self._hear,
            hears_compile=True,
        )
        from piecework.engine.async_engine import AsyncEngine  # noqa: PLC0415  imports torch
        from piecework.engine.text_engine import TextEngine  # noqa: PLC0415

        engine = AsyncEngine(opened.engine)
        self._serve(opened, engine, TextEngine(engine, opened.tokenizer), kv_blocks=opened.num_blocks)

    def _bring_up_encoder(self) -> None:
        opened = open_encoder(
            self._spec, self._options, environment=self._environment, on_event=self._hear, hears_compile=True
        )
        self._serve(opened, opened.engine, opened.engine)

    def _serve(self, opened: Opened, engine: _Engine, service: AnyService, **figures: int) -> None:
        """Let a service answer; where it runs the eager form, compile what was asked for meanwhile."""
        with self._mutex:
            self._engine = engine
        use = _use(opened)
        self._status.serves(service, bundle=use)
        hit = "hit" if use.hit else "miss"
        self._log.event("ready", seconds=self._status.uptime_s, backend=use.backend, bundle=hit, **figures)
        if opened.is_meanwhile:
            self._replace(opened, engine)

    def _replace(self, opened: Opened, engine: _Engine) -> None:
        """Compile what was asked for while its eager form serves, and go over to it between two steps."""
        try:
            compiled = open_compiled(opened)
            with phase("switch", on_event=self._hear):
                engine.swap_runner(compiled.model)
        except PieceworkError as error:
            if not self._ending:
                # what runs goes on running
                self._log.event("compile_failed", error=type(error).__name__, asked=error.asked, found=error.found)
            return
        service = self._status.service
        if service is not None:
            use = _use(compiled)
            self._status.serves(service, bundle=use)
            self._log.event("switched", seconds=self._status.uptime_s, backend=use.backend)

    def _load_tokenizer(self) -> Tokenizer:
        from piecework.engine.text.tokenizer import load_tokenizer  # noqa: PLC0415  takes part of the start

        return load_tokenizer(self._spec.source, chat_template=self._options.chat_template)

    def _hear(self, event: StartEvent) -> None:
        """Tell the status and the log."""
        match event:
            case Phase():
                self._status.note_phase(event)
            case Note(text):
                self._log.event("note", text=text)
            case BundleMissing(reason):
                meanwhile = self._options.while_compiling.value
                self._log.event("bundle_missing", reason=reason, while_compiling=meanwhile)
            case CompileBegins(process, backend, reason):
                with self._mutex:
                    if self._stopped:
                        process.stop()  # so that it refuses to run
                    self._process = process
                self._status.compile_begins(reason=reason, backend=backend)
            case CompileGoesOn(backend, step):
                self._status.compile_goes_on(step.text, done=step.done, total=step.total)
                self._log.event("compiling", backend=backend, stage=step.text, done=step.done, total=step.total)
            case CompileEnds(last=True):
                self._status.compile_ends()


def _use(opened: Opened) -> BundleUse:
    bundle = opened.found.bundle
    return BundleUse(
        hit=not opened.reason,
        backend=opened.spec.options.backend.value,
        report=lambda: describe(bundle, verified=True).to_json(),
    )
