"""Compile the model of a directory in Hugging Face layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from piecework.bundle.bundle import Bundle, write_bundle
from piecework.bundle.facts import making_facts
from piecework.bundle.recipes import Take, resolved, takes
from piecework.bundle.record import Recorder
from piecework.bundle.signatures import read_trust
from piecework.bundle.store.interface import ASKED, Store, bundle_key
from piecework.bundle.store.lookup import find_bundle
from piecework.compiler.backends.backend import AotiBackend, Backend, EagerBackend
from piecework.compiler.setup import CompileSetup, OnProgress, unheard
from piecework.foundation.environment import Environment
from piecework.foundation.target import Target, read_target
from piecework.spec.compile_options import BackendName, CompileOptions
from piecework.spec.model_spec import ModelSpec

if TYPE_CHECKING:
    from piecework.capture.request import CaptureRequest


@dataclass(frozen=True)
class CompiledModel:
    """A model's bundle; `cached` says that a valid one was there already."""

    bundle: Bundle
    cached: bool


def compile_model(
    spec: ModelSpec,
    *,
    store: Store,
    environment: Environment,
    check_weights: bool = True,
    out: Path | None = None,
    recorder: Recorder | None = None,
    on_progress: OnProgress = unheard,
) -> CompiledModel:
    """Return the bundle of a model, compiled unless the store has a valid one.

    Args:
        spec: which model, compiled how.
        store: where artifacts and (without `out`) the bundle live.
        environment: where the C++ compiler is, and what it prepares once per machine.
        check_weights: whether the checkpoint must hold every tensor in the right shape; else only config.json is read.
        out: where to write the bundle; None for the store.
        recorder, on_progress: see CompileSetup.

    Raises UnsupportedModelError, WeightsError, CaptureError, ShapeContractError, CompileError, StoreError.
    """
    recorder = recorder or Recorder()
    target = read_target()
    key = spec.key
    with contextlib.ExitStack() as stack:
        if out is None:
            stack.enter_context(store.lock(key))
            trust = read_trust(environment.trust, is_own=store.made_here)
            found = find_bundle(store, key, report=recorder.note, asked=spec.asked, target=target, trust=trust)
            if found is not None:
                return CompiledModel(found, cached=True)
        scratch = stack.enter_context(store.scratch())
        backend = stack.enter_context(
            started_backend(
                spec.options, scratch=scratch, environment=environment, target=target, device=spec.options.device
            )
        )
        with recorder.phase("import"):
            # heavy imports, while the backend prepares in other processes
            from piecework.compiler.driver import compile_request  # noqa: PLC0415
            from piecework.models.adapter import build_causal_lm  # noqa: PLC0415
            from piecework.models.reads import model_reads  # noqa: PLC0415
        reads = stack.enter_context(model_reads(spec.config))
        with recorder.phase("build"), reads.building():
            request = build_causal_lm(spec)
            if check_weights:
                _check_weights(spec, request)
        content = compile_request(
            request,
            CompileSetup(spec.options, backend, store, target, recorder, on_progress),
            facts=lambda: (*spec.facts, *making_facts(), *reads.facts()),
            identity={**spec.identity, ASKED: key},
        ).content
        with recorder.phase("seal"):
            if out is not None:
                return CompiledModel(write_bundle(out, content), cached=False)
            bundle = store.put_bundle(bundle_key(key, content.facts), content=content)
        return CompiledModel(bundle, cached=False)


@contextlib.contextmanager
def started_backend(
    options: CompileOptions, *, scratch: Path, environment: Environment, target: Target, device: str
) -> Iterator[Backend]:
    """Start the backend that `options` names; it is closed, with its processes, when the block is left."""
    backend: Backend
    if options.backend is BackendName.EAGER:
        backend = EagerBackend(scratch=scratch)
    else:
        backend = AotiBackend(
            root=environment.toolchain_root,
            scratch=scratch,
            compiler=environment.compiler,
            target=target,
            device=device,
        )
    try:
        yield backend
    finally:
        backend.close()


def _check_weights(spec: ModelSpec, request: CaptureRequest) -> None:
    """Raise WeightsError where the checkpoint does not hold what the module needs. Reads headers only."""
    from piecework.models.checkpoint import open_checkpoint  # noqa: PLC0415  torch comes after the backend has started

    checkpoint = open_checkpoint(spec.source)
    names = frozenset(checkpoint.names())
    sources = {n: request.sources.get(n, Take(n, tuple(p.shape))) for n, p in request.module.named_parameters()}
    needed = (take for source in sources.values() for take in takes(resolved(source, names)))
    checkpoint.check({take.name: take.shape for take in needed})
