"""Compile the model of a directory in Hugging Face layout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from piecework.bundle.bundle import Bundle, write_bundle
from piecework.bundle.recipes import Take, resolved, takes
from piecework.bundle.record import Recorder
from piecework.bundle.store.interface import Store
from piecework.bundle.store.lookup import find_bundle
from piecework.compiler.backends.backend import AotiBackend, Backend, EagerBackend
from piecework.compiler.options import BackendName, CompileOptions
from piecework.foundation.target import Target, read_target
from piecework.models.bundle_key import bundle_key, expected_facts
from piecework.models.config import ModelConfig
from piecework.models.latent_config import DEFAULT_KV_CACHE_DTYPE, DEFAULT_MLA

if TYPE_CHECKING:
    from piecework.capture.request import CaptureRequest

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CompiledModel:
    """A model's bundle; `cached` says that a valid one was there already."""

    bundle: Bundle
    cached: bool


def compile_model(
    config: ModelConfig,
    *,
    dtype: str,
    max_tokens: int,
    options: CompileOptions,
    check_weights: bool,
    store: Store,
    toolchain_root: Path,
    compiler: str | None,
    out: Path | None,
    recorder: Recorder,
    on_progress: OnProgress,
    mla: str = DEFAULT_MLA,
    kv_cache_dtype: str = DEFAULT_KV_CACHE_DTYPE,
) -> CompiledModel:
    """Return the bundle of a model, compiled unless the store has a valid one.

    Args:
        config: the model directory's.
        dtype: type of weights and activations.
        max_tokens: most tokens in one forward pass.
        options: how to compile.
        check_weights: whether the checkpoint must hold every tensor in the right shape; else only config.json is read.
        store: where artifacts and (without `out`) the bundle live.
        toolchain_root: directory for what the C++ compiler prepares once per machine.
        compiler: the C++ compiler's command, or None to search for one.
        out: where to write the bundle; None for the store.
        recorder, on_progress: see `compiler.driver.compile_request`.
        mla: "exposed" or "opaque", for models with latent attention; see `models/latent_attention.py`.
        kv_cache_dtype: "auto", or "fp8" for these models; see `ops/mla/cache.py`.

    Raises UnsupportedModelError, WeightsError, CaptureError, ShapeContractError, CompileError, StoreError.
    """
    target = read_target()
    latent = {"mla": mla, "kv_cache_dtype": kv_cache_dtype}
    expected = expected_facts(config, dtype=dtype, max_tokens=max_tokens, options=options.facts(), **latent)
    key = bundle_key(expected, target=target)
    with contextlib.ExitStack() as stack:
        if out is None:
            stack.enter_context(store.lock(key))
            found = find_bundle(store, key, report=recorder.note, expected=expected, target=target)
            if found is not None:
                return CompiledModel(found, cached=True)
        scratch = stack.enter_context(store.scratch())
        backend = stack.enter_context(
            started_backend(
                options,
                scratch=scratch,
                root=toolchain_root,
                compiler=compiler,
                target=target,
                device=options.device,
            )
        )
        with recorder.phase("import"):
            # heavy imports, while the backend prepares in other processes
            from piecework.compiler.driver import compile_request  # noqa: PLC0415
            from piecework.models.adapter import build_causal_lm  # noqa: PLC0415
        with recorder.phase("build"):
            request = build_causal_lm(config.path, dtype=dtype, max_tokens=max_tokens, device=options.device, **latent)
            if check_weights:
                _check_weights(config, request)
        sealed = compile_request(
            request,
            options=options,
            backend=backend,
            store=store,
            target=target,
            recorder=recorder,
            on_progress=on_progress,
            facts=expected,
            identity={
                "architecture": config.architecture,
                "layers": config.num_layers,
                "dtype": dtype,
                "max_tokens": max_tokens,
                **({} if config.latent is None else latent),
            },
        )
        with recorder.phase("seal"):
            content = sealed.content
            if out is None:
                return CompiledModel(store.put_bundle(key, content=content), cached=False)
            return CompiledModel(
                write_bundle(
                    out,
                    plan=content.plan,
                    artifacts=content.artifacts,
                    facts=content.facts,
                    record=content.record,
                    constants=content.constants,
                    identity=content.identity or {},
                    explanation=content.explanation,
                ),
                cached=False,
            )


@contextlib.contextmanager
def started_backend(
    options: CompileOptions, *, scratch: Path, root: Path, compiler: str | None, target: Target, device: str
) -> Iterator[Backend]:
    """Start the backend that `options` names; it is closed, with its processes, when the block is left."""
    backend: Backend
    if options.backend is BackendName.EAGER:
        backend = EagerBackend(scratch=scratch)
    else:
        backend = AotiBackend(root=root, scratch=scratch, compiler=compiler, target=target, device=device)
    try:
        yield backend
    finally:
        backend.close()


def _check_weights(config: ModelConfig, request: CaptureRequest) -> None:
    """Raise WeightsError where the checkpoint does not hold what the module needs. Reads headers only."""
    from piecework.models.checkpoint import open_checkpoint  # noqa: PLC0415  torch comes after the backend has started

    checkpoint = open_checkpoint(config.path)
    names = frozenset(checkpoint.names())
    sources = {n: request.sources.get(n, Take(n, tuple(p.shape))) for n, p in request.module.named_parameters()}
    needed = (take for source in sources.values() for take in takes(resolved(source, names)))
    checkpoint.check({take.name: take.shape for take in needed})
