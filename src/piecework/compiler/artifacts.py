"""Make the artifacts of unique pieces: look them up by key, compile what is missing, split a range where needed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from piecework.bundle.facts import package_version
from piecework.bundle.format import FORMAT
from piecework.bundle.record import Recorder
from piecework.bundle.store.interface import Artifact
from piecework.bundle.store.lookup import find_artifact
from piecework.capture.request import Dim
from piecework.compiler.backends import aoti, interfaces, rebuild, toolchain, vector_exp
from piecework.compiler.job import Job
from piecework.compiler.passes import native_matmul, pack_linear
from piecework.compiler.rewrite import fakes
from piecework.compiler.setup import CompileSetup, OnProgress
from piecework.errors import CompileError, ShapeContractError
from piecework.foundation.digests import digest_file, digest_json
from piecework.foundation.environment import compiler_settings
from piecework.foundation.flight import Flight
from piecework.foundation.gpu import gpu_architecture
from piecework.foundation.target import Target
from piecework.foundation.torch_private import inductor, scheduled_kernels, symbolic
from piecework.ops.ir import decode, interface, resolve
from piecework.ops.ir.program import Program
from piecework.spec.compile_options import BackendName, CompileOptions

Bounds = tuple[int, int]


class Compiled(Protocol):
    """What is compiled: a program, its symbol for the primary size (or None), and the constants that are packed."""

    @property
    def program(self) -> Program:
        """The program that a backend compiles."""

    @property
    def primary(self) -> str | None:
        """The program's symbol for the primary size, or None where it doesn't have it."""

    @property
    def pack(self) -> Mapping[int, str]:
        """Constants that are bound packed, and how."""


@dataclass(frozen=True)
class _Form:
    """One wanted artifact: which unique piece, for which range of the primary size."""

    piece: int
    bounds: Bounds
    job: Job


def compile_artifacts(
    pieces: Sequence[Compiled], setup: CompileSetup, *, declared: Dim | None, optional: int = 0
) -> list[dict[Bounds, Artifact]]:
    """Return, for each unique piece, its artifact by range of the primary size.

    Args:
        pieces: the unique pieces.
        setup: how, and with what.
        declared: the primary size's declared range, or None where the module has no dynamic size.
        optional: how many of them, the last ones, can be done without: one whose code would hold for a part of its
            range gets no artifact, and a note.

    Where the code that a backend generates for a range from 1 does not hold for 1, the range is split there, once, and
    the record says so. Raises ShapeContractError where that does not help, CompileError, StoreError.
    """
    options, target = setup.options, setup.target
    wanted = [
        _Form(i, bounds, _job(piece, bounds=bounds if options.ranges else None, options=options, target=target))
        for i, piece in enumerate(pieces)
        for bounds in _ranges(piece, declared=declared, options=options)
    ]
    made: list[dict[Bounds, Artifact]] = [{} for _ in pieces]
    progress = _Progress(setup.recorder, setup.on_progress)
    while wanted:
        found, narrowed = _found_or_compiled([form.job for form in wanted], setup, progress)
        failed: list[_Form] = []
        for form in wanted:
            artifact = found.get(form.job.key())
            if artifact is not None:
                made[form.piece][form.bounds] = artifact
            elif form.piece >= len(pieces) - optional:
                setup.recorder.note(f"a body inside opaque ops is not compiled: {narrowed[form.job.key()].found}")
            else:
                failed.append(form)
        wanted = [
            part
            for form in failed
            for part in _split_at_1(form, pieces[form.piece], setup, why=narrowed[form.job.key()])
        ]
    return made


def _found_or_compiled(
    jobs: Sequence[Job], setup: CompileSetup, progress: _Progress
) -> tuple[dict[str, Artifact], Mapping[str, ShapeContractError]]:
    """Return the artifacts by key, and why the code of the others would hold for a part of its range only.

    Each is put into the store as soon as it is there. What another process compiles is waited for when all else is
    done.
    """
    wanted = {job.key(): job for job in jobs}
    found: dict[str, Artifact] = {}
    narrowed: dict[str, ShapeContractError] = {}

    def is_made(key: str) -> bool:
        stored = find_artifact(setup.store, key, report=setup.recorder.note)
        if stored is not None:
            found[key] = stored
            progress.found()
        return stored is not None

    progress.begin(wanted)
    missing = {key: job for key, job in wanted.items() if not is_made(key)}
    if not missing:
        return found, narrowed
    setup.backend.expect(missing)
    with Flight(setup.store.lease, overtake_s=setup.overtake_s) as flight:

        def put(key: str, path: Path) -> None:
            found[key] = setup.store.put_artifact(key, content=path)
            flight.landed(key)

        for led in flight.rounds(missing, is_made=is_made):
            mine = {key: missing[key] for key in led}
            progress.compiling(mine)
            narrowed |= setup.backend.compile(mine, on_event=progress.on_event, on_made=put)
    return found, narrowed


def _split_at_1(form: _Form, piece: Compiled, setup: CompileSetup, *, why: ShapeContractError) -> list[_Form]:
    """Return a form's range as 1 and all above it; raises `why` where it can't be split there."""
    low, high = form.bounds
    if low != 1 or high == 1 or piece.primary is None:
        raise why
    setup.recorder.note(f"piece {form.piece} has an artifact of its own for 1: {why.found}")
    return [
        _Form(form.piece, bounds, _job(piece, bounds=bounds, options=setup.options, target=setup.target))
        for bounds in ((1, 1), (2, high))
    ]


class _Progress:
    """Turns a backend's events into counts and progress."""

    def __init__(self, recorder: Recorder, on_progress: OnProgress) -> None:
        self._recorder = recorder
        self._on_progress = on_progress
        self._jobs: dict[str, Job] = {}
        self._done = 0
        self._total = 0

    def begin(self, wanted: Mapping[str, Job]) -> None:
        """Say which artifacts are needed."""
        self._jobs.update(wanted)
        self._total += len(wanted)
        for count in ("store_hits", "compiled"):
            self._recorder.count(count, by=0)

    def found(self) -> None:
        """Say that the store has one of them, from before or from another process."""
        self._recorder.count("store_hits")
        self._done += 1

    def compiling(self, jobs: Mapping[str, Job]) -> None:
        """Say what is about to be compiled here."""
        self._recorder.count("compiled", by=len(jobs))
        self._on_progress("compiling", self._done, self._total)

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Take in one event of a backend."""
        if event["event"] == "note":
            self._recorder.note(str(event["text"]))
        elif event["event"] == "start":
            calls = self._jobs[event["job"]].program.calls
            self._on_progress(f"compiling a piece of {len(calls)} operators", self._done, self._total)
        elif event["event"] == "done":
            self._done += 1
            self._recorder.add_seconds("compile/pieces", seconds=event["seconds"])
            self._on_progress("compiling", self._done, self._total)


def _ranges(piece: Compiled, *, declared: Dim | None, options: CompileOptions) -> list[Bounds]:
    if declared is None:
        return [(0, 0)]
    if piece.primary is None or not options.ranges:
        return [(declared.min, declared.max)]
    if options.ranges[0][0] != declared.min or options.ranges[-1][1] != declared.max:
        raise CompileError(
            asked=f"artifacts for the ranges {options.facts()['ranges']}",
            found=f"they cover {options.ranges[0][0]}:{options.ranges[-1][1]}, the model's range is "
            f"{declared.min}:{declared.max}",
            try_="let the ranges begin and end where the declared range does (see --max-tokens)",
        )
    return list(options.ranges)


@functools.cache
def _generator_digest() -> str:
    """Return the digest of our own code between a program and its library: an artifact of other code is another one."""
    own = (
        aoti,
        interfaces,
        interface,
        rebuild,
        fakes,
        toolchain,
        vector_exp,
        pack_linear,
        native_matmul,
        decode,
        resolve,
    )
    sources = [Path(module.__file__ or "") for module in (*own, inductor, scheduled_kernels, symbolic)]
    return digest_json([digest_file(source) for source in sources])


def _inside(piece: Compiled, bounds: Bounds) -> Bounds:
    """Return the part of a range for which the program was traced: variants may have the rest."""
    low, high = next((least, most) for name, least, most in piece.program.symbols if name == piece.primary)
    return min(max(bounds[0], low), high), max(min(bounds[1], high), low)


def _job(piece: Compiled, *, bounds: Bounds | None, options: CompileOptions, target: Target) -> Job:
    if options.backend is BackendName.EAGER:
        own = {"generator": _generator_digest()}  # what an artifact says that it takes and gives depends on it
        return Job(program=piece.program, options={"backend": "eager", "format": FORMAT}, target=own)
    narrower = {} if piece.primary is None or bounds is None else {piece.primary: _inside(piece, bounds)}
    return Job(
        program=piece.program,
        ranges=narrower,
        pack=piece.pack,
        options={"backend": options.backend.value},
        target={
            "isa": target.fact,
            "machine": target.machine,
            **({"gpu": gpu_architecture()} if any(i.device == "cuda" for i in piece.program.inputs) else {}),
            "torch": package_version("torch"),
            "generator": _generator_digest(),
            **compiler_settings(),
        },
    )
