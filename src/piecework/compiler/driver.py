"""The order of a compile: capture, split, dedupe, look up, compile what is missing, plan, seal."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from piecework.bundle.bundle import BundleContent
from piecework.bundle.facts import Fact, environment_facts, option_facts, package_version, source_facts
from piecework.bundle.packings import OWN
from piecework.bundle.plan import Plan, ShapeRange
from piecework.bundle.record import Recorder
from piecework.bundle.store.interface import Artifact
from piecework.bundle.where import Where, spell_range
from piecework.capture.capture import CapturedGraph, capture
from piecework.capture.general import parts
from piecework.capture.held import BuffersChange
from piecework.capture.locations import source_of
from piecework.capture.request import CaptureRequest, Variant
from piecework.compiler.artifacts import compile_artifacts
from piecework.compiler.deduplicate import Deduplicated, Forward, deduplicate
from piecework.compiler.explanations import explain_pieces
from piecework.compiler.kernel_builds import KernelBuilds, kernel_jobs
from piecework.compiler.natives import Native, collect_natives
from piecework.compiler.packing import packing_of
from piecework.compiler.passes.lower import Lowering
from piecework.compiler.passes.native_matmul import native_paths
from piecework.compiler.planning import make_plan
from piecework.compiler.setup import CompileSetup
from piecework.compiler.split import Piece, has_unknown_size, split, why_one_piece
from piecework.errors import CaptureError, ShapeContractError
from piecework.foundation.process import garbage_collection_off
from piecework.foundation.torch_private import operator_name
from piecework.providers.discovery import Providers, load_providers
from piecework.spec.compile_options import BackendName

_MOST_PARTS: Final = 4
"""Graphs of one module, for parts of its sizes' ranges."""


@dataclass(frozen=True)
class Sealed:
    """A finished compile: what goes into the bundle, and what could not be shared, with the reason (notes as well)."""

    content: BundleContent
    plan: Plan
    fallbacks: tuple[str, ...] = ()


def compile_request(
    request: CaptureRequest,
    setup: CompileSetup,
    *,
    facts: Callable[[], Iterable[Fact]] = tuple,
    identity: Mapping[str, Any] | None = None,
    arguments: Any = None,
    check: Callable[[Built], Iterable[str]] | None = None,
) -> Sealed:
    """Compile a module and return its bundle's content.

    Args:
        request: what to compile.
        setup: how, and with what.
        facts: gives the facts about the model, beside those of the environment, options and sources that ran while it
            was traced; called when all of it was.
        identity: what the bundle is of, for people.
        arguments: how a caller's arguments map to inputs (see api.py), or None.
        check: runs what was made before it is sealed; what it returns is noted.

    Raises CaptureError, ShapeContractError, CompileError, StoreError.
    """
    setup.on_progress("capturing", 0, 0)
    with garbage_collection_off(), setup.recorder.phase("capture"):
        captures = capture_variants(request)
        _require_cuts(request.opaque, captures)
    built = build(captures, setup, arguments=arguments)
    if check is not None:
        setup.on_progress("checking", 0, 0)
        with setup.recorder.phase("check"):
            for note in check(built):
                setup.recorder.note(note)
    with setup.recorder.phase("plan"):
        all_facts = (
            *environment_facts(target=setup.target, device=request.device),
            *option_facts(setup.options.facts()),
            *request.facts,
            *facts(),
            *_facts(built),
        )
        explanation = explain_pieces(built.paths, built.pieces).to_json()
    content = BundleContent(
        plan=built.plan.to_json(),
        artifacts={artifact.name: artifact.path for artifact in built.artifacts},
        facts=tuple(all_facts),
        record=setup.recorder.finish(),
        constants=_literals(built.paths),
        identity=identity or {},
        explanation={**explanation, **({"natives": [n.to_json() for n in built.natives]} if built.natives else {})},
    )
    return Sealed(content, built.plan, fallbacks(built.paths))


@dataclass(frozen=True)
class Built:
    """What captured graphs became: a plan, and the artifacts that it names.

    Attributes:
        plan: of all forwards.
        artifacts: of pieces, of bodies inside opaque ops, and kernels.
        paths: the forwards in steps.
        pieces: their unique pieces.
        natives: bodies of IR ops that opaque ops call.
        kernels: the builds of opaque ops' own kernels.
        providers: what was loaded.
        called: files whose code said which IR ops opaque ops call.
    """

    plan: Plan
    artifacts: tuple[Artifact, ...]
    paths: tuple[Forward, ...]
    pieces: Deduplicated
    natives: tuple[Native, ...]
    kernels: KernelBuilds
    providers: Providers
    called: frozenset[Path]


def build(
    captures: Sequence[tuple[CapturedGraph, Variant | None]], setup: CompileSetup, *, arguments: Any = None
) -> Built:
    """Split, dedupe, compile what the store hasn't, and plan; see `compile_request` for the arguments.

    `captures` are a model's forwards, wherever they come from; the last one is no variant's.
    """
    options, target, recorder = setup.options, setup.target, setup.recorder
    providers = load_providers(options.providers.names)
    lowering = Lowering(options.providers, providers.absent)
    request = captures[-1][0].request
    called = set[Path]()
    with garbage_collection_off(), recorder.phase("split"):
        if options.backend is not BackendName.EAGER:
            _require_known_sizes(captured for captured, _ in captures)
        paths = tuple(Forward(captured, split(captured), variant) for captured, variant in captures)
        packing = packing_of(options, target=target, device=request.device)
        pieces = deduplicate(paths, passes=options.passes, packing=packing, lowering=lowering)
        natives = collect_natives(paths, lowering=lowering, sources=called)
        bodies = [native.piece for native in natives if native.piece is not None]
    _note_capture(recorder, paths, pieces)
    recorder.count("natives", by=len(natives))
    steps = [step for path in paths for step in path.steps]
    jobs = kernel_jobs(steps, options=options, target=target, device=request.device)
    kernels = KernelBuilds(jobs, setup)
    with recorder.phase("compile"), contextlib.closing(kernels):
        kernels.start()
        artifacts = compile_artifacts(
            [*pieces.unique, *bodies],
            setup,
            declared=next(iter(request.sizes.values()), None),
            optional=len(bodies),
        )
        built = kernels.finish()
    setup.on_progress("sealing", len(artifacts), len(artifacts))
    with recorder.phase("plan"):
        ranges = [[ShapeRange(lo, hi, artifact.name) for (lo, hi), artifact in forms.items()] for forms in artifacts]
        plan = make_plan(paths, pieces, artifacts=ranges[: len(pieces.unique)], arguments=arguments)
        of_bodies = iter(ranges[len(pieces.unique) :])
        plan = dataclasses.replace(
            plan,
            kernels={name: artifact.name for name, artifact in built.items()},
            natives=tuple(n.planned(() if n.piece is None else next(of_bodies)) for n in natives),
        )
    files = [*(artifact for forms in artifacts for artifact in forms.values()), *built.values()]
    return Built(plan, tuple(files), paths, pieces, natives, kernels, providers, frozenset(called))


def capture_variants(request: CaptureRequest) -> list[tuple[CapturedGraph, Variant | None]]:
    """Capture a request's variants, each like a request of its own, and then the rest, with None.

    Where one graph doesn't hold for all sizes of the rest, it is up to four, for parts of the sizes' ranges.

    Raises CaptureError, ShapeContractError.
    """
    rest = dataclasses.replace(request, variants=())
    try:
        variants = [(capture(dataclasses.replace(rest, call=variant.call)), variant) for variant in request.variants]
        return [*variants, *_capture_apart(rest, most=_MOST_PARTS)]
    except BuffersChange as found:  # all forwards hold the same ones
        held = tuple(sorted({*(request.held or ()), *found.names}))
        return capture_variants(dataclasses.replace(request, held=held))


def _capture_apart(request: CaptureRequest, *, most: int) -> list[tuple[CapturedGraph, Variant | None]]:
    """Capture a request; where its code goes another way in a part of a size's range, that part is a variant.

    Raises ShapeContractError where more than `most` parts would be needed, CaptureError.
    """
    try:
        return [(capture(request), None)]
    except ShapeContractError as error:
        whole, found = error, parts(error.conditions, request.traced_sizes)
    if found is None or most < 2:
        raise whole
    size, lower, upper = found
    given = (size, lower.min, lower.max)
    note = f"{spell_range(given)} has pieces of its own: the module's code goes another way there"
    below = dataclasses.replace(request, narrowed={**request.narrowed, size: lower})
    above = dataclasses.replace(request, narrowed={**request.narrowed, size: upper}, notes=(*request.notes, note))
    try:
        variants = [(made, _also(given, variant, request)) for made, variant in _capture_apart(below, most=most - 1)]
        return [*variants, *_capture_apart(above, most=most - len(variants))]
    except ShapeContractError as error:
        raise whole from error  # what doesn't hold for the whole range says more than what doesn't for a part


def _also(given: tuple[str, int, int], variant: Variant | None, request: CaptureRequest) -> Variant:
    """Return the variant of batches that a variant is of (None: all), and in which a size is in a range as well."""
    where = (Where() if variant is None else variant.where).also(*given)
    return Variant(where.text().replace(" and ", ", "), where, request.call)


def _require_known_sizes(graphs: Iterable[CapturedGraph]) -> None:
    """Raise CaptureError where a tensor's size depends on values: no code is generated for that."""
    for captured in graphs:
        for node in captured.graph.nodes:
            if has_unknown_size(node):
                raise CaptureError(
                    asked="code for tensors whose sizes follow from those of the inputs",
                    found=f"the size of what {operator_name(node.target)} gives depends on values",
                    try_="use a mask (torch.where), hide it in an opaque op, or compile with the eager backend",
                    location=source_of([node]),
                )


def _require_cuts(wanted: Collection[str], captures: Iterable[tuple[CapturedGraph, Variant | None]]) -> None:
    """Raise CaptureError where a graph was to be cut at an operator that it doesn't have."""
    there = {
        name for made, _ in captures for node in made.graph.nodes if (name := operator_name(node.target)) is not None
    }
    missing = sorted(set(wanted) - there)
    if missing:
        raise CaptureError(
            asked=f"cut the graph at {', '.join(missing)}",
            found="no call of it in the module's graph",
            try_=f"one of {', '.join(sorted(there))}",
        )


def fallbacks(paths: Sequence[Forward]) -> tuple[str, ...]:
    """Say where blocks could not be shared, or a graph not be cut, and why."""
    found = dict.fromkeys(note for path in paths for note in path.captured.stacks.unshared)
    whole = dict.fromkeys(why_one_piece(path.steps, path.captured) for path in paths)
    return (*found, *(note for note in whole if note is not None))


def _facts(built: Built) -> list[Fact]:
    """Return what artifacts and providers depend on, beside the environment and the options."""
    sources = source_facts(built.called.union(*(path.captured.sources for path in built.paths)))
    files = sorted({*sources, *built.kernels.facts(), *_inlined_facts(built.pieces)})
    return [*_provider_facts(built), *files]


def _provider_facts(built: Built) -> list[Fact]:
    """Return the versions of the packages whose implementations pieces and bodies have."""
    several = [*(unique.sites for unique in built.pieces.unique), *(native.sites for native in built.natives)]
    chosen = {site.provider for sites in several for site in sites}
    packages = sorted({package for name, package in built.providers.packages.items() if name in chosen})
    return [Fact("provider", package, package_version(package)) for package in packages]


def _inlined_facts(pieces: Deduplicated) -> tuple[Fact, ...]:
    """Return the facts of the files that are compiled into pieces besides their own code."""
    packings = {how for unique in pieces.unique for how in unique.pack.values()}
    inlined = not packings.isdisjoint(OWN)
    return source_facts(native_paths()) if inlined else ()


def _note_capture(recorder: Recorder, paths: Sequence[Forward], pieces: Deduplicated) -> None:
    held = paths[-1].captured.request.held
    if held:
        recorder.note(
            f"the forward changes {', '.join(held)}: the loaded model holds what is written from call to call"
        )
    for path in paths:
        recorder.count("blocks_traced", by=path.captured.stacks.traced)
        recorder.count("blocks_stamped", by=path.captured.stacks.stamped)
        recorder.count("pieces", by=sum(isinstance(s, Piece) for s in path.steps))
    recorder.count("unique_pieces", by=len(pieces.unique))
    for note in (*dict.fromkeys(note for path in paths for note in path.captured.request.notes), *fallbacks(paths)):
        recorder.note(note)
    recorder.count("ir_ops", by=sum(len(unique.sites) for unique in pieces.unique))


def _literals(paths: Sequence[Forward]) -> bytes | None:
    literals = {name: tensor for path in paths for name, tensor in path.captured.literals.items()}
    if not literals:
        return None
    from safetensors.torch import save  # noqa: PLC0415  only models with computed buffers need it

    made: bytes = save({n: t.contiguous() for n, t in literals.items()})
    return made
