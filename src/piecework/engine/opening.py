"""`open_engine`: from a spec to an engine. `LLM`, `piecework generate` and `piecework serve` all come up this way, and
by engine/encoding/opening.py so do `Embedder` and `CrossEncoder`.

Warm: the tokenizer is loaded, the bundle is looked up and checked, and the weights' files are read ahead while torch is
being imported; then weights are bound. Nothing imports transformers or a compiler. Cold: a process compiles, and says
how far it is; meanwhile, where that is wanted, a bundle of the eager backend runs, which is compiled in seconds.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeVar

from piecework.bundle.bundle import open_bundle
from piecework.bundle.facts import require
from piecework.bundle.signatures import Trust, read_trust
from piecework.bundle.store.directory import DirectoryStore
from piecework.bundle.store.interface import Store
from piecework.engine.bundles import FoundBundle, find, run_compile, why_missing
from piecework.engine.compile_process import CompileProcess, parse_step
from piecework.engine.events import (
    BundleMissing,
    CompileBegins,
    CompileEnds,
    CompileGoesOn,
    Note,
    OnEvent,
    phase,
)
from piecework.engine.options import EngineOptions, WhileCompiling
from piecework.errors import UnsupportedModelError
from piecework.foundation.environment import Environment
from piecework.spec.compile_options import BackendName
from piecework.spec.encoder_config import Task
from piecework.spec.model_spec import ModelSpec
from piecework.spec.passes import MERGE_LINEAR
from piecework.spec.weight_files import weight_files

if TYPE_CHECKING:
    from piecework.bundle.run import LoadedModel
    from piecework.engine.engine import Engine
    from piecework.engine.loading import Loaded
    from piecework.engine.text.tokenizer import Tokenizer

_DEFAULT: Final = EngineOptions()
AnyOpened = TypeVar("AnyOpened", bound="Opened")


@dataclass(frozen=True)
class Start:
    """What is to be opened, and who hears of it; see `open_engine`."""

    spec: ModelSpec
    options: EngineOptions
    store: Store
    environment: Environment
    trust: Trust | None
    on_event: OnEvent
    hears_compile: bool


@dataclass(frozen=True)
class Opened:
    """A model that runs.

    Attributes:
        model: what runs.
        found: its bundle.
        spec: what that was compiled as: the spec asked for, or its eager form while the other one isn't there.
        tokenizer: the model's, if it has one.
        reason: why there was no bundle, or "".
    """

    model: LoadedModel
    found: FoundBundle
    spec: ModelSpec
    tokenizer: Tokenizer | None
    reason: str
    _start: Start

    @property
    def is_meanwhile(self) -> bool:
        """Whether it runs the eager form, until `open_compiled` gives what was asked for."""
        return self.spec != self._start.spec


@dataclass(frozen=True)
class OpenEngine(Opened):
    """An engine that takes requests.

    Attributes:
        engine: the engine.
        num_blocks: of the KV cache.
    """

    engine: Engine
    num_blocks: int


@dataclass(frozen=True)
class _Chosen:
    """The bundle that is loaded, as what it was compiled, and why the store had none (or "")."""

    found: FoundBundle
    spec: ModelSpec
    reason: str = ""


def open_engine(
    spec: ModelSpec,
    options: EngineOptions = _DEFAULT,
    *,
    environment: Environment,
    tokenizer: Callable[[], Tokenizer | None] | None = None,
    on_event: OnEvent = lambda _: None,
    hears_compile: bool = False,
) -> OpenEngine:
    """Find the spec's bundle, else compile it in a process; verify and load it, and allocate the KV cache.

    Args:
        spec: which model, compiled how.
        options: the engine's.
        environment: where the store is, which remote stands behind it, and whose bundles are trusted.
        tokenizer: loads the tokenizer, in a thread; None loads the directory's, if it has one.
        on_event: hears how it goes, from several threads.
        hears_compile: whether a compile's progress comes as events; else its process writes it to stderr.

    With `WhileCompiling.EAGER` and without a bundle, the engine runs one of the eager backend; `open_compiled` then
    compiles and loads the other, to be swapped in.

    Raises BundleError, UntrustedBundle, WeightsError, CompileError, CapacityError, UnsupportedModelError, StoreError.
    """
    check_task(spec, Task.GENERATE)
    start = begin_opening(spec, options, environment, on_event, hears_compile=hears_compile)
    with start.store.in_use():
        loaded, opened = open_model(start, tokenizer)
        from piecework.engine.loading import make_engine  # noqa: PLC0415  imports torch

        engine = make_engine(loaded, spec, options, tokenizer=opened.tokenizer, on_event=on_event)
        return OpenEngine(**vars(opened), engine=engine, num_blocks=loaded.num_blocks)


def check_task(spec: ModelSpec, wanted: Task) -> None:
    """Raise UnsupportedModelError where a model does something else with texts."""
    task = spec.config.task
    if task is not wanted:
        raise UnsupportedModelError(
            asked=f"{_DOES[wanted]} with {spec.source}",
            found=f"{spec.config.architecture}, made to {_DOES[task]}",
            try_=_USE[task],
        )


_DOES: Final = {Task.GENERATE: "continue texts", Task.EMBED: "embed texts", Task.SCORE: "score pairs of texts"}
_USE: Final = {
    Task.GENERATE: "piecework.LLM, piecework generate, or piecework serve",
    Task.EMBED: "piecework.Embedder, or piecework serve and POST /v1/embeddings",
    Task.SCORE: "piecework.CrossEncoder, or piecework serve and POST /v1/rerank",
}


def begin_opening(
    spec: ModelSpec, options: EngineOptions, environment: Environment, on_event: OnEvent, *, hears_compile: bool
) -> Start:
    """Return what is to be opened, with the local store and whose bundles are trusted; arguments as `open_engine`."""
    store = DirectoryStore(environment.store_root)
    trust = read_trust(environment.keys_file(options.trust), is_own=store.made_here)
    return Start(spec, options, store, environment, trust, on_event, hears_compile)


def open_model(start: Start, tokenizer: Callable[[], Tokenizer | None] | None = None) -> tuple[Loaded, Opened]:
    """Find the spec's bundle, else compile it, and load it with its weights; arguments and errors as `open_engine`."""
    spec = start.spec
    pool = ThreadPoolExecutor(3, thread_name_prefix="piecework-start")
    try:
        # importing torch is the longest part; the rest waits for the disk, or computes without Python's lock
        imported = pool.submit(_import_torch, start)
        loading = pool.submit(_load_tokenizer, start, tokenizer)
        weights = pool.submit(_read_weights_ahead, start)
        found = _find(start)
        if found is not None:
            chosen = _Chosen(found, spec)
        else:
            weights.result(), loading.result()  # what is missing is told before a compile that would be in vain
            chosen = _compile(start)
        imported.result()
        made = loading.result()
    finally:
        pool.shutdown(wait=False)
    loaded = _load(start, chosen)
    opened = Opened(loaded.model, chosen.found, chosen.spec, made, chosen.reason, _start=start)
    return loaded, opened


def open_compiled(opened: AnyOpened) -> AnyOpened:
    """Compile and load what was asked for while its eager form runs; raises as `open_engine`.

    The engine, or the encoder, is the same: its runner is to be swapped for the model that is returned.
    """
    start = opened._start
    with start.store.in_use():
        found = _run_compile(start, start.spec, reason=opened.reason)
        loaded = _load(start, _Chosen(found, start.spec))
    return replace(opened, model=loaded.model, found=found, spec=start.spec)


def _load(start: Start, chosen: _Chosen) -> Loaded:
    from piecework.engine.loading import load_model  # noqa: PLC0415  imports torch

    return load_model(chosen.found.bundle, start.spec, start.options, on_event=start.on_event)


def _import_torch(start: Start) -> None:
    with phase("import torch", on_event=start.on_event):
        import piecework.engine.loading  # noqa: PLC0415, F401  in its own phase, beside the others


def _load_tokenizer(start: Start, load: Callable[[], Tokenizer | None] | None) -> Tokenizer | None:
    with phase("tokenizer", on_event=start.on_event):
        if load is not None:
            return load()
        from piecework.engine.text.tokenizer import load_tokenizer  # noqa: PLC0415  a part of what is measured

        encoder = start.spec.config.encoder
        if encoder is None and not (start.spec.source / "tokenizer.json").exists():
            return None
        longest = None if encoder is None else encoder.longest
        return load_tokenizer(start.spec.source, longest=longest, chat_template=start.options.chat_template)


def _read_weights_ahead(start: Start) -> None:
    """Have the system read the weights' files, which are mapped into memory later. Raises WeightsError."""
    if start.options.random_weights is not None:
        return
    files = weight_files(start.spec.source, start.spec.config.weight_folders)
    with phase("read weights ahead", on_event=start.on_event):
        for path in files.prefixes:
            with contextlib.suppress(OSError), path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _find(start: Start) -> FoundBundle | None:
    """Return the bundle that was given, or the store's, with its files and facts checked."""
    with phase("bundle", on_event=start.on_event):
        path, spec = start.options.bundle, start.spec
        if path is None:
            return _find_stored(start, spec, remote=start.environment.remote)
        begun = time.perf_counter()
        bundle = open_bundle(path, extract_root=start.environment.store_root, trust=start.trust)
        require(bundle.facts, what=f"run {spec.source} from {path}", asked=spec.named)
        return FoundBundle(bundle, compiled=False, verify_s=time.perf_counter() - begun)


def _find_stored(start: Start, spec: ModelSpec, *, remote: str | None = None) -> FoundBundle | None:
    def note(text: str) -> None:
        start.on_event(Note(text))

    return find(spec, store=start.store, on_note=note, trust=start.trust, remote=remote)


def _compile(start: Start) -> _Chosen:
    """Compile the spec's bundle, or find or compile the eager one that runs meanwhile."""
    spec = start.spec
    reason = why_missing(spec, store=start.store)
    start.on_event(BundleMissing(reason))
    if start.options.while_compiling is WhileCompiling.WAIT or spec.options.backend is BackendName.EAGER:
        return _Chosen(_run_compile(start, spec, reason=reason), spec, reason)
    meanwhile = eager_form(spec)
    found = _find_stored(start, meanwhile) or _run_compile(start, meanwhile, reason=reason)
    return _Chosen(found, meanwhile, reason)


def eager_form(spec: ModelSpec) -> ModelSpec:
    """Return a spec that is compiled in seconds and loaded quickly: merged weights would be copied."""
    off = spec.options.passes_off | {MERGE_LINEAR}
    return replace(spec, options=replace(spec.options, backend=BackendName.EAGER, passes_off=off))


def _run_compile(start: Start, spec: ModelSpec, *, reason: str) -> FoundBundle:
    """Compile a bundle in a process, and report how far it is."""
    process = CompileProcess(spec, trust=start.options.trust, weights=start.options.random_weights is None)
    backend = spec.options.backend.value
    is_last = spec == start.spec

    def hear(line: str) -> None:
        start.on_event(CompileGoesOn(backend, parse_step(line)))

    start.on_event(CompileBegins(process, backend, reason))
    try:
        with phase("compile" if is_last else f"compile ({backend})", on_event=start.on_event):
            found = run_compile(process, on_line=hear if start.hears_compile else None)
        if start.trust is not None:
            start.trust.require(found.bundle.head(), bundle=str(found.bundle.path))
        return found
    finally:
        start.on_event(CompileEnds(backend, last=is_last))
