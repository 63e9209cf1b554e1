"""Which pieces of a model's forwards are the same, and what each different one becomes before it is compiled."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from piecework.capture.capture import CapturedGraph
from piecework.capture.request import Variant
from piecework.compiler.passes.lower import CallSite, Lowered, Lowering
from piecework.compiler.passes.packing import Packing
from piecework.compiler.passes.pipeline import Pipeline
from piecework.compiler.rewrite.interface import PassReport
from piecework.compiler.rewrite.rewritten import Rewritten
from piecework.compiler.split import OpaqueCall, Piece, Step
from piecework.ops.ir.program import Program


@dataclass(frozen=True)
class Unique:
    """A structurally different piece.

    Attributes:
        captured: the piece as it was captured.
        passed: the piece after passes; its IR ops are not lowered yet.
        lowered: the piece after passes and lowering, which is what a backend compiles.
        primary: the program's symbol for the primary size, or None where the piece doesn't have it.
        pack: constants of the lowered program that are bound packed, and how.
        uses: how many pieces are equal to it.
        sites: its calls of IR ops, and which provider each has.
        passes: what each pass did with it.
    """

    captured: Program
    passed: Program
    lowered: Rewritten
    primary: str | None
    pack: Mapping[int, str]
    uses: int
    sites: tuple[CallSite, ...] = ()
    passes: tuple[PassReport, ...] = ()

    @property
    def program(self) -> Program:
        """The program that a backend compiles."""
        return self.lowered.program


@dataclass(frozen=True)
class Forward:
    """A forward in steps: the one of a variant, or (`variant` None) the one for all other batches."""

    captured: CapturedGraph
    steps: Sequence[Step]
    variant: Variant | None = None

    @property
    def primary(self) -> str:
        """The graph's symbol for the first declared size, or "" where there is none."""
        first = next(iter(self.captured.request.sizes), None)
        return next((symbol for symbol, name in self.captured.size_names.items() if name == first), "")


@dataclass(frozen=True)
class Deduplicated:
    """The unique pieces of a model, and which of them each piece is: `index_of[path, step]`."""

    unique: tuple[Unique, ...]
    index_of: Mapping[tuple[int, int], int]


def deduplicate(
    paths: Sequence[Forward],
    *,
    passes: Collection[str] = (),
    packing: Packing | None = None,
    lowering: Lowering | None = None,
) -> Deduplicated:
    """Group pieces by fingerprint, and run the passes over each unique one.

    Pieces that have the primary size in another place are different: an artifact for a part of its range must not serve
    another size.

    Args:
        paths: a model's forwards; they share pieces.
        passes: names of the passes that run (compiler/passes/pipeline.py).
        packing: which weights are packed; None: none are.
        lowering: chooses providers of IR ops (compiler/passes/lower.py); None leaves the ops as they are.

    Raises OpError where no provider that is asked for supports a call.
    """
    order: dict[tuple[str, str | None], int] = {}
    first: list[tuple[Piece, str | None]] = []
    uses: list[int] = []
    strict: list[set[int]] = []
    index_of: dict[tuple[int, int], int] = {}
    for path_number, path in enumerate(paths):
        opaque = {step.node for step in path.steps if isinstance(step, OpaqueCall) and step.takes_any_strides}
        for number, step in enumerate(path.steps):
            if not isinstance(step, Piece):
                continue
            primary = step.symbols.get(path.primary)
            structure = step.program.fingerprint(), primary
            if structure not in order:
                order[structure] = len(first)
                first.append((step, primary))
                uses.append(0)
                strict.append(set())
            index = index_of[path_number, number] = order[structure]
            uses[index] += 1
            strict[index].update(i for i, node in enumerate(step.outputs) if not opaque.issuperset(node.users))
    unique = []
    pipeline = Pipeline(passes)
    for (piece, primary), count, positions in zip(first, uses, strict, strict=True):
        strictly = frozenset(positions)
        passed = pipeline.run(piece.program, strict_outputs=strictly)
        made = passed.rewritten
        lowered = Lowered(made.program)
        if lowering is not None:
            lowered = lowering.lower(made.program, strict_outputs=strictly, origins=made.origins)
        pack = packing.of(lowered.program) if packing is not None else {}
        after = replace(made, program=lowered.program)
        sites, reports = lowered.sites, passed.reports
        unique.append(Unique(piece.program, made.program, after, primary, pack, count, sites, reports))
    return Deduplicated(tuple(unique), index_of)
