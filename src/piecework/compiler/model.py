"""Compile the model of a directory in Hugging Face layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from piecework.bundle.bundle import Bundle, BundleContent, write_bundle
from piecework.bundle.facts import making_facts
from piecework.bundle.plan import Plan
from piecework.bundle.record import Recorder
from piecework.bundle.signatures import read_trust
from piecework.bundle.store.interface import ASKED, Store, bundle_key
from piecework.bundle.store.lookup import find_bundle
from piecework.compiler.backends.backend import AotiBackend, Backend, EagerBackend
from piecework.compiler.backends.toolchain import find_toolchain
from piecework.compiler.setup import CompileSetup, OnProgress, unheard
from piecework.foundation.environment import Environment
from piecework.foundation.flight import leading
from piecework.foundation.target import Target, read_target
from piecework.models.weight_check import Wanted, find_wanted, wanted_by, wanted_by_module
from piecework.spec.compile_options import BackendName, CompileOptions
from piecework.spec.model_spec import ModelSpec
from piecework.spec.weight_files import weight_files

if TYPE_CHECKING:
    pass


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
    recorder, found = recorder or Recorder(), list[Bundle]()
    content = _compiled(
        spec,
        store=store,
        environment=environment,
        recorder=recorder,
        check_weights=check_weights,
        on_progress=on_progress,
    )
    if out is not None:
        with content as made, recorder.phase("seal"):
            return CompiledModel(write_bundle(out, made), cached=False)
    target = read_target()
    trust = read_trust(environment.trust, is_own=store.made_here)

    def is_made() -> bool:
        bundle = find_bundle(store, spec.key, report=recorder.note, asked=spec.asked, target=target, trust=trust)
        found.extend([] if bundle is None else [bundle])
        return bundle is not None

    # of those that start with the same model one captures it, which takes memory; pieces would be shared without this
    with leading(spec.key, store.lease, is_made=is_made, overtake_s=environment.overtake_s) as leads:
        if not leads:
            if check_weights:
                _check_weights(spec, wanted_by(Plan.from_json(found[-1].plan())))
            return CompiledModel(found[-1], cached=True)
        with content as made, recorder.phase("seal"):
            return CompiledModel(store.put_bundle(bundle_key(spec.key, made.facts), content=made), cached=False)


@contextlib.contextmanager
def _compiled(
    spec: ModelSpec,
    *,
    store: Store,
    environment: Environment,
    recorder: Recorder,
    check_weights: bool,
    on_progress: OnProgress,
) -> Iterator[BundleContent]:
    """Compile what a bundle is made of; it is kept from being collected during the block. See `compile_model`."""
    target, device = read_target(), spec.options.device
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(store.scratch())
        backend = stack.enter_context(
            started_backend(spec.options, scratch=scratch, environment=environment, target=target, device=device)
        )
        with recorder.phase("import"):
            # heavy imports, while the backend prepares in other processes
            from piecework.compiler.driver import compile_request  # noqa: PLC0415
            from piecework.models.adapter import build_request  # noqa: PLC0415
            from piecework.models.reads import model_reads  # noqa: PLC0415
        reads = stack.enter_context(model_reads(spec.config))
        with recorder.phase("build"), reads.building():
            request = build_request(spec)
            if check_weights:
                _check_weights(spec, wanted_by_module(request))
        setup = CompileSetup(spec.options, backend, store, target, recorder, on_progress, environment.overtake_s)
        yield compile_request(
            request,
            setup,
            facts=lambda: (*spec.facts, *making_facts(), *reads.facts()),
            identity={**spec.identity, ASKED: spec.key},
        ).content


@contextlib.contextmanager
def started_backend(
    options: CompileOptions, *, scratch: Path, environment: Environment, target: Target, device: str
) -> Iterator[Backend]:
    """Start the backend that `options` names; it is closed, with its processes, when the block is left."""
    backend: Backend
    if options.backend is BackendName.EAGER:
        backend = EagerBackend(scratch=scratch)
    else:
        root, command = environment.toolchain_root, environment.compiler
        toolchain = find_toolchain(root, compiler=command, overtake_s=environment.overtake_s)
        backend = AotiBackend(toolchain, scratch=scratch, target=target, device=device)
    try:
        yield backend
    finally:
        backend.close()


def _check_weights(spec: ModelSpec, wanted: Sequence[Wanted]) -> None:
    """Raise WeightsError where the checkpoint does not hold what the model needs. Reads headers, where they tell."""
    folders = spec.config.weight_folders
    if find_wanted(weight_files(spec.source, folders), wanted).untied:
        from piecework.models.checkpoint import open_checkpoint  # noqa: PLC0415  a hit does without torch

        open_checkpoint(spec.source, wanted, folders=folders)
