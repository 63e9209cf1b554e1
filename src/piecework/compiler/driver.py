"""The order of a compile: capture, split, dedupe, look up, compile what is missing, plan, seal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


from piecework.compiler.backends import Backend
from piecework.compiler.job import Job
from piecework.compiler.options import BackendName, CompileOptions, packed_dtypes
from piecework.compiler.planning import Deduplicated, Unique, deduplicate, make_plan
from piecework.errors import CompileError
from piecework.foundation.process import garbage_collection_off
from piecework.foundation.target import Target
from piecework.graph.capture import CapturedGraph, capture
from piecework.graph.request import CaptureRequest
from piecework.graph.split import Piece, split
from piecework.passes.pack_linear import packable_constants
from piecework.record import Recorder
from piecework.store.facts import Fact, environment_facts, option_facts, package_version, source_facts
from piecework.store.lookup import find_artifact
from piecework.store.plan import Plan, ShapeRange
from piecework.store.stores import Artifact, BundleContent, Store

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how many unique pieces are done, and how many there are (0: not known yet)."""


@dataclass(frozen=True)
class Sealed:
    """A finished compile: what goes into the bundle."""

    content: BundleContent
    plan: Plan


def compile_request(
    request: CaptureRequest,
    *,
    options: CompileOptions,
    backend: Backend,
    store: Store,
    target: Target,
    recorder: Recorder,
    on_progress: OnProgress,
    facts: Sequence[Fact] = (),
    identity: Mapping[str, Any] | None = None,
    arguments: Any = None,
) -> Sealed:
    """Compile a module and return its bundle's content.

    Args:
        request: what to compile.
        options: how.
        backend: makes the artifacts.
        store: artifacts that are there already are not compiled again; new ones are put there.
        target: the CPU that the artifacts run on.
        recorder: is told phases ("capture", "split", "compile", "seal"), counts and notes.
        on_progress: see OnProgress.
        facts: facts about the model, beside those of the environment, options and sources.
        identity: what the bundle is of, for people.
        arguments: how a caller's arguments map to inputs (see api.py), or None.

    Raises CaptureError, ShapeContractError, CompileError, StoreError.
    """
    on_progress("capturing", 0, 0)
    with garbage_collection_off():
        with recorder.phase("capture"):
            captured = capture(request)
        with recorder.phase("split"):
            steps = split(captured)
            primary = _primary_symbol(captured) if options.ranges else ""
            pieces = deduplicate(
                steps,
                primary=primary,
                pack_dtypes=packed_dtypes(options, target=target, device=request.device),
                packer=packable_constants,
            )
    _note_capture(recorder, captured, steps=steps, pieces=pieces)
    with recorder.phase("compile"):
        artifacts = _compile(pieces, request, options=options, backend=backend, store=store, target=target,
                             recorder=recorder, on_progress=on_progress)  # fmt: skip
    on_progress("sealing", len(pieces.unique), len(pieces.unique))
    with recorder.phase("plan"):
        ranges = [
            [ShapeRange(lo, hi, artifact.name) for (lo, hi), artifact in forms.items()] for forms in artifacts
        ]
        plan = make_plan(captured, steps, pieces, artifacts=ranges, arguments=arguments)
        all_facts = (
            *environment_facts(target=target),
            *option_facts(options.facts()),
            *facts,
            *source_facts(captured.sources),
        )
    files = {artifact.name: artifact.path for forms in artifacts for artifact in forms.values()}
    content = BundleContent(
        plan=plan.to_json(),
        artifacts=files,
        facts=tuple(all_facts),
        record=recorder.finish(),
        constants=_literals(captured),
        identity=identity or {},
    )
    return Sealed(content, plan)


def _compile(
    pieces: Deduplicated,
    request: CaptureRequest,
    *,
    options: CompileOptions,
    backend: Backend,
    store: Store,
    target: Target,
    recorder: Recorder,
    on_progress: OnProgress,
) -> list[dict[tuple[int, int], Artifact]]:
    """Return, for each unique piece, its artifact by range of the primary size."""
    jobs: dict[str, Job] = {}
    wanted: list[dict[tuple[int, int], str]] = []
    for unique in pieces.unique:
        forms = {}
        for low, high in _ranges(unique, request=request, options=options):
            job = _job(unique, low=low, high=high, options=options, target=target)
            forms[low, high] = job.key()
            jobs[job.key()] = job
        wanted.append(forms)
    found: dict[str, Artifact] = {}
    for key in jobs:
        artifact = find_artifact(store, key, report=recorder.note)
        if artifact is not None:
            found[key] = artifact
    recorder.count("store_hits", by=len(found))
    missing = {key: job for key, job in jobs.items() if key not in found}
    recorder.count("compiled", by=len(missing))
    total, done = len(jobs), len(found)
    on_progress("compiling", done, total)

    def on_event(event: Mapping[str, Any]) -> None:
        nonlocal done
        if event["event"] == "note":
            recorder.note(str(event["text"]))
        if event["event"] == "start":
            program = missing[event["job"]].program
            on_progress(f"compiling a piece of {len(program.calls)} operators", done, total)
        if event["event"] == "done":
            done += 1
            recorder.add_seconds("compile/pieces", seconds=event["seconds"])
            on_progress("compiling", done, total)

    for key, path in backend.compile(missing, on_event=on_event).items():
        found[key] = store.put_artifact(key, content=path)
    return [{bounds: found[key] for bounds, key in forms.items()} for forms in wanted]


def _ranges(unique: Unique, *, request: CaptureRequest, options: CompileOptions) -> list[tuple[int, int]]:
    if not request.sizes:
        return [(0, 0)]
    declared = next(iter(request.sizes.values()))
    if unique.primary is None or not options.ranges:
        return [(declared.min, declared.max)]
    if options.ranges[0][0] != declared.min or options.ranges[-1][1] != declared.max:
        raise CompileError(
            asked=f"artifacts for the ranges {options.facts()['ranges']}",
            found=f"they cover {options.ranges[0][0]}:{options.ranges[-1][1]}, the model's range is "
            f"{declared.min}:{declared.max}",
            try_="let the ranges begin and end where the declared range does (see --max-tokens)",
        )
    return list(options.ranges)


def _job(unique: Unique, *, low: int, high: int, options: CompileOptions, target: Target) -> Job:
    bounds = {unique.primary: (low, high)} if unique.primary is not None and options.ranges else {}
    if options.backend is BackendName.EAGER:
        return Job(program=unique.program, options={"backend": "eager"})
    return Job(
        program=unique.program,
        ranges=bounds,
        pack=unique.pack,
        options={"backend": options.backend.value},
        target={"isa": target.fact, "machine": target.machine, "torch": package_version("torch")},
    )


def _primary_symbol(captured: CapturedGraph) -> str:
    first = next(iter(captured.request.sizes), None)
    return next((symbol for symbol, name in captured.size_names.items() if name == first), "")


def _note_capture(
    recorder: Recorder, captured: CapturedGraph, *, steps: Sequence[object], pieces: Deduplicated
) -> None:
    recorder.count("blocks_traced", by=captured.stacks.traced)
    recorder.count("blocks_stamped", by=captured.stacks.stamped)
    recorder.count("pieces", by=sum(isinstance(s, Piece) for s in steps))
    recorder.count("unique_pieces", by=len(pieces.unique))
    for note in captured.stacks.notes:
        recorder.note(note)


def _literals(captured: CapturedGraph) -> bytes | None:
    if not captured.literals:
        return None
    from safetensors.torch import save  # noqa: PLC0415  only models with computed buffers need it

    made: bytes = save({n: t.contiguous() for n, t in captured.literals.items()})
    return made
