"""What a compile of a model would have to compile: captured, split and looked up, with nothing made."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from piecework.bundle.record import Recorder
from piecework.bundle.store.interface import Store
from piecework.compiler.backends.backend import Backend, OnEvent, OnMade
from piecework.compiler.driver import build, capture_variants
from piecework.compiler.job import Job
from piecework.compiler.setup import CompileSetup
from piecework.errors import ShapeContractError
from piecework.foundation.target import read_target
from piecework.models.adapter import build_request
from piecework.spec.model_spec import ModelSpec


@dataclass(frozen=True)
class DryRun:
    """What a compile would find and make.

    Attributes:
        pieces: pieces of the model.
        unique_pieces: different ones.
        stored: artifacts that the store has.
        missing: operators of each piece that would be compiled, by its artifact's key.
    """

    pieces: int
    unique_pieces: int
    stored: int
    missing: Mapping[str, int]


def dry_run(spec: ModelSpec, *, store: Store) -> DryRun:
    """Capture a model and look its artifacts up. Raises as a compile of it, but for what its backend fails with."""
    recorder, backend = Recorder(), _Dry()
    with contextlib.suppress(_StopHere):
        build(
            capture_variants(build_request(spec)),
            CompileSetup(spec.options, backend, store, read_target(), recorder),
        )
    counts = recorder.finish().counts
    return DryRun(counts["pieces"], counts["unique_pieces"], counts.get("store_hits", 0), backend.missing)


class _StopHere(Exception):
    """Nothing more is to be found out."""


@final
class _Dry(Backend):
    def __init__(self) -> None:
        self.missing: dict[str, int] = {}

    def expect(self, jobs: Mapping[str, Job]) -> None:
        self.missing = {key: len(job.program.calls) for key, job in jobs.items()}
        raise _StopHere

    def compile(
        self, jobs: Mapping[str, Job], *, on_event: OnEvent, on_made: OnMade
    ) -> Mapping[str, ShapeContractError]:
        raise _StopHere

    def close(self) -> None:
        pass
