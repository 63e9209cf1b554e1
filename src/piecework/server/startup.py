"""Bring a model up beside the HTTP server: what can overlap does, and each phase is noted with its begin and end.

Warm: the tokenizer is loaded, the bundle is looked up and checked, and the weights' files are read ahead while torch is
being imported; then weights are bound. Nothing imports transformers or a compiler. Cold: a process compiles, and says
how far it is; meanwhile, where that is wanted, a bundle of the eager backend serves, which is compiled in seconds.
"""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, final

from piecework.bundle.bundle import open_bundle
from piecework.bundle.facts import require
from piecework.bundle.store.interface import Store
from piecework.engine.bundles import FoundBundle, find, run_compile, why_missing
from piecework.engine.compile_process import CompileProcess, parse_step
from piecework.errors import PieceworkError, WeightsError
from piecework.report.inspect import describe
from piecework.server.log import EventLog
from piecework.server.options import ModelOptions, WhileCompiling
from piecework.server.status import BundleUse, ServerStatus, State
from piecework.spec.compile_options import BackendName
from piecework.spec.model_spec import ModelSpec

if TYPE_CHECKING:
    from piecework.bundle.bundle import Bundle
    from piecework.engine.async_engine import AsyncEngine
    from piecework.engine.text.tokenizer import Tokenizer

_STOP_S: Final = 10.0


@final
class ModelStart:
    """Brings one model up, in threads of its own.

    Args:
        options: which, and how large.
        store: the local store.
        status: is told how far it is, and gets the service.
        log: is told what happens.
        failed: is set where the model can't be served; the error is in `error` then.
    """

    def __init__(
        self,
        options: ModelOptions,
        *,
        store: Store,
        status: ServerStatus,
        log: EventLog,
        failed: threading.Event,
    ) -> None:
        self._options = options
        self._store = store
        self._status = status
        self._log = log
        self._failed = failed
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="piecework-start")
        self._thread = threading.Thread(target=self._run, name="piecework-start", daemon=True)
        self._mutex = threading.Lock()
        self._process: CompileProcess | None = None
        self._engine: AsyncEngine | None = None
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
        except Exception as error:  # noqa: BLE001 - the thread's edge: whoever started it raises it
            if self._ending:
                return
            self.error = error
            self._status.fails(str(error))
            self._failed.set()

    def _bring_up(self) -> None:
        # importing torch is the longest part; the rest waits for the disk, or computes without Python's lock
        imported = self._pool.submit(self._import_torch)
        tokenizer = self._pool.submit(self._load_tokenizer)
        weights = self._pool.submit(self._read_weights_ahead)
        found = self._find()
        ready = partial(self._ready, imported, tokenizer)
        if found is not None:
            self._serve(found, ready(), wanted=self._options.spec, hit=True)
            return
        weights.result(), tokenizer.result()  # what is missing is told before a compile that would be in vain
        native = self._options.spec
        why = why_missing(native, store=self._store)
        self._log.event("bundle_missing", reason=why, while_compiling=self._options.while_compiling.value)
        if self._options.while_compiling is WhileCompiling.WAIT:
            self._serve(self._compiled(native, reason=why), ready(), wanted=native, hit=False)
            return
        eager = self._wanted(BackendName.EAGER)
        meanwhile = find(eager, store=self._store, on_note=self._note) or self._compiled(eager, reason=why)
        self._serve(meanwhile, ready(), wanted=eager, hit=False)
        self._replace(native, reason=why)

    def _ready(self, imported: Future[None], tokenizer: Future[Tokenizer]) -> Tokenizer:
        """Wait for what every load needs."""
        imported.result()
        return tokenizer.result()

    def _import_torch(self) -> None:
        with self._status.phase("import torch"):
            import piecework.engine.async_engine  # noqa: PLC0415  in its own phase, beside the others
            import piecework.server.loading  # noqa: PLC0415, F401

    def _wanted(self, backend: BackendName) -> ModelSpec:
        spec = self._options.spec
        return replace(spec, options=replace(spec.options, backend=backend))

    def _load_tokenizer(self) -> Tokenizer:
        with self._status.phase("tokenizer"):
            from piecework.engine.text.tokenizer import load_tokenizer  # noqa: PLC0415  a part of what is measured

            return load_tokenizer(self._options.spec.config.path)

    def _find(self) -> FoundBundle | None:
        with self._status.phase("bundle"):
            path = self._options.bundle
            if path is None:
                return find(self._options.spec, store=self._store, on_note=self._note)
            spec = self._options.spec
            bundle = open_bundle(path)
            require(bundle.facts, asked=f"serve {spec.source} from {path}", expected=spec.asked_facts)
            return FoundBundle(bundle, compiled=False, verify_s=0.0)

    def _read_weights_ahead(self) -> None:
        """Have the system read the weights' files, which are mapped into memory later. Raises WeightsError."""
        if self._options.random_weights is not None:
            return
        directory = self._options.spec.config.path
        with self._status.phase("read weights ahead"):
            files = sorted(directory.glob("*.safetensors"))
            if not files:
                raise WeightsError(
                    asked=f"the weights in {directory}",
                    found="no safetensors",
                    try_="give a directory that holds them, or --random-weights SEED to try without",
                )
            for path in files:
                with contextlib.suppress(OSError), path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def _note(self, text: str) -> None:
        self._log.event("note", text=text)

    def _compiled(self, wanted: ModelSpec, *, reason: str) -> FoundBundle:
        """Compile a bundle in a process, and say how far it is."""
        process, backend = CompileProcess(wanted), wanted.options.backend.value
        native = wanted == self._options.spec
        with self._mutex:
            if self._stopped:
                process.stop()  # so that it refuses to run
            self._process = process
        name = "compile" if native else f"compile ({backend})"
        self._status.compile_begins(reason=reason, backend=backend)
        try:
            with self._status.phase(name):
                return run_compile(process, on_line=partial(self._compile_line, backend))
        finally:
            if native:
                self._status.compile_ends()

    def _compile_line(self, backend: str, line: str) -> None:
        step = parse_step(line)
        self._status.compile_goes_on(step.text, done=step.done, total=step.total)
        self._log.event("compiling", backend=backend, stage=step.text, done=step.done, total=step.total)

    def _serve(self, found: FoundBundle, tokenizer: Tokenizer, *, wanted: ModelSpec, hit: bool) -> None:
        from piecework.engine.async_engine import AsyncEngine  # noqa: PLC0415  imports torch
        from piecework.engine.text_engine import TextEngine  # noqa: PLC0415
        from piecework.server.loading import load_model, make_engine  # noqa: PLC0415

        loaded = load_model(found.bundle, self._options, status=self._status)
        engine = AsyncEngine(
            make_engine(loaded, self._options, tokenizer=tokenizer, status=self._status, on_note=self._note)
        )
        with self._mutex:
            self._engine = engine
        self._status.serves(TextEngine(engine, tokenizer), bundle=self._use(found.bundle, wanted=wanted, hit=hit))
        self._log.event(
            "ready",
            seconds=self._status.uptime_s,
            backend=wanted.options.backend.value,
            bundle="hit" if hit else "miss",
            kv_blocks=loaded.num_blocks,
        )

    def _replace(self, native: ModelSpec, *, reason: str) -> None:
        """Compile the native bundle while another serves, and go over to it between two steps."""
        from piecework.server.loading import load_model  # noqa: PLC0415  imports torch

        assert self._engine is not None
        try:
            found = self._compiled(native, reason=reason)
            model = load_model(found.bundle, self._options, status=self._status).model
            with self._status.phase("switch"):
                self._engine.swap_runner(model)
        except PieceworkError as error:
            if not self._ending:
                # what runs goes on running
                self._log.event("compile_failed", error=type(error).__name__, asked=error.asked, found=error.found)
            return
        service = self._status.service
        if service is not None:
            self._status.serves(service, bundle=self._use(found.bundle, wanted=native, hit=False))
            self._log.event("switched", seconds=self._status.uptime_s, backend=native.options.backend.value)

    def _use(self, bundle: Bundle, *, wanted: ModelSpec, hit: bool) -> BundleUse:
        return BundleUse(
            hit=hit, backend=wanted.options.backend.value, report=lambda: describe(bundle, verified=True).to_json()
        )
