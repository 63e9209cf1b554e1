"""What is in a bundle: a report as data, which is written as text for people and as JSON for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from piecework.bundle import Bundle, Fact
from piecework.bundle.format import FORMAT, PLAN
from piecework.bundle.manifest import corrupt
from piecework.bundle.plan import OpStep, PieceStep, Plan, Recipe, State, UniquePiece
from piecework.bundle.recipes import Concat, HeadProduct, HeadRows, Quantized, Stack
from piecework.bundle.record import Record
from piecework.report.kernel_counts import (
    MOVED,
    MovedTable,
    PieceKernels,
    moved_table,
    piece_kernels,
    table_lines,
    typical_sizes,
)
from piecework.report.natives import NativeReport, native_lines, native_reports
from piecework.report.passes import PassUse, pass_lines, pass_uses
from piecework.report.spelling import spell_bytes, spell_count
from piecework.report.step_labels import step_labels


@dataclass(frozen=True)
class ArtifactReport:
    """A unique piece's artifact for the values `min` to `max` of the primary size; `size_bytes` of the file."""

    min: int
    max: int
    file: str
    size_bytes: int


@dataclass(frozen=True)
class PieceReport:
    """A unique piece.

    Args:
        fingerprint: of its structure.
        num_ops: how many operators it has.
        num_constants: how many weights each instance binds.
        num_uses: how many of the plan's steps run it.
        device: the type of device that it was compiled for.
        artifacts: one per shape range.
    """

    fingerprint: str
    num_ops: int
    num_constants: int
    num_uses: int
    device: str
    artifacts: tuple[ArtifactReport, ...]


@dataclass(frozen=True)
class ForwardReport:
    """The forward of one kind of batch: how many steps run a piece, and how many call an opaque op.

    `when` says which batches, such as "decode_tokens = tokens"; "" is all that no other forward is for.
    """

    name: str
    when: str
    num_pieces: int
    num_ops: int


@dataclass(frozen=True)
class BundleReport:
    """What is in a bundle.

    Args:
        path: what was opened.
        digest: of the bundle.
        format: the version of its format.
        piecework: the version that wrote it.
        verified: whether every file's digest was checked.
        size_bytes: of all its files, uncompressed.
        identity: what it's of.
        num_pieces: how many of the plan's steps run a piece, those of all forwards.
        forwards: the kinds of batches that have a forward of their own, and the rest.
        unique_pieces: the pieces that are structurally different.
        opaque_ops: how many steps call which opaque op.
        sizes: the dynamic sizes with their least and greatest values.
        primary: the dynamic size that chooses among a piece's artifacts.
        inputs: names of the plan's inputs.
        states: what lives between calls, such as KV caches.
        recipes: how many constants are made how, such as {"take bfloat16, pack mkldnn_linear": 84}.
        facts: what must hold.
        record: what happened while it was compiled.
        kernels: of the unique pieces, in their order.
        moved: what forwards and their layers move at some sizes.
        passes: what each pass did.
        natives: what serves calls of IR ops inside opaque ops.
        steps: of the rest's forward: which piece or opaque op each step is, and of which layers.
    """

    path: str
    digest: str
    format: int
    piecework: str
    verified: bool
    size_bytes: int
    identity: Mapping[str, object]
    num_pieces: int
    forwards: tuple[ForwardReport, ...]
    unique_pieces: tuple[PieceReport, ...]
    opaque_ops: Mapping[str, int]
    sizes: Mapping[str, tuple[int, int]]
    primary: str
    inputs: tuple[str, ...]
    states: tuple[State, ...]
    recipes: Mapping[str, int]
    facts: tuple[Fact, ...]
    record: Record
    kernels: tuple[PieceKernels, ...]
    moved: tuple[MovedTable, ...]
    passes: tuple[PassUse, ...] = ()
    natives: tuple[NativeReport, ...] = ()
    steps: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the report as a JSON object."""
        facts = {f"{fact.kind}/{fact.name}": fact.value for fact in self.facts}
        return {
            **asdict(self),
            "num_unique_pieces": len(self.unique_pieces),
            "facts": facts,
            "record": self.record.to_json(),
            "kernels": [piece.to_json() for piece in self.kernels],
        }

    def to_text(self, *, all_passes: bool = False) -> str:
        """Return the report as lines for people.

        Args:
            all_passes: whether every place is named where a pass applied or nearly did, and not only how many.
        """
        sections = [
            self._head(),
            _section("dynamic sizes", [f"{name}: {low} to {high}" for name, (low, high) in self.sizes.items()]),
            _section("forwards", [_forward_line(f) for f in self.forwards] if len(self.forwards) > 1 else []),
            _section(
                "unique pieces",
                [
                    line
                    for piece, kernels in zip(self.unique_pieces, self.kernels, strict=True)
                    for line in _piece_lines(piece, kernels, primary=self.primary)
                ],
            ),
            _section(MOVED, [line for table in self.moved for line in table_lines(table)]),
            _section("passes", pass_lines(self.passes, everything=all_passes)),
            _section("IR ops inside opaque ops", list(native_lines(self.natives))),
            _section("opaque ops", [f"{count:>6} × {name}" for name, count in self.opaque_ops.items()]),
            _section("recipes", [f"{count:>6} × {kind}" for kind, count in self.recipes.items()]),
            _section("states", _state_lines(self.states)),
            _section("facts", _fact_lines(self.facts)),
            _section("record", _record_lines(self.record)),
        ]
        return "\n\n".join(section for section in sections if section)

    def _head(self) -> str:
        lines = [
            f"bundle         {self.path}",
            f"digest         {self.digest}",
            f"written by     piecework {self.piecework}, format {self.format}",
            f"verified       {'every file matches its digest' if self.verified else 'no (use --verify)'}",
            f"size           {spell_bytes(self.size_bytes)}",
            f"pieces         {self.num_pieces}, of which {len(self.unique_pieces)} unique",
            *(f"{name:<14} {value}" for name, value in self.identity.items()),
        ]
        return "\n".join(lines)


def describe(bundle: Bundle, *, verified: bool, sizes: Sequence[Mapping[str, int]] = ()) -> BundleReport:
    """Return what is in a bundle.

    Args:
        bundle: the bundle.
        verified: whether every file's digest was checked.
        sizes: the sizes at which it is said what forwards move, some of the plan's by name; default: 1 and 32 of the
            primary one. The others are as large as that one.

    Raises PieceworkError where the plan has no such size, CorruptBundle where its plan isn't one.
    """
    plan = Plan.from_json(bundle.plan())
    if not all(0 <= instance.piece < len(plan.pieces) for instance in plan.instances):
        raise corrupt(PLAN, bundle=str(bundle.path), found="has instances of pieces that it doesn't have")
    piece_steps = [step for step in plan.all_steps if isinstance(step, PieceStep)]
    if not all(0 <= step.instance < len(plan.instances) for step in piece_steps):
        raise corrupt(PLAN, bundle=str(bundle.path), found="has steps of instances that it doesn't have")
    uses = Counter(plan.instances[step.instance].piece for step in piece_steps)
    pieces = [_piece(bundle, piece=piece, num_uses=uses[index]) for index, piece in enumerate(plan.pieces)]
    kernels = piece_kernels(bundle, plan)
    return BundleReport(
        path=str(bundle.path),
        digest=bundle.digest,
        format=FORMAT,
        piecework=bundle.manifest.piecework,
        verified=verified,
        size_bytes=bundle.size_bytes,
        identity=bundle.identity,
        num_pieces=uses.total(),
        forwards=tuple(_forwards(plan)),
        unique_pieces=tuple(pieces),
        opaque_ops=_counted(step.op for step in plan.all_steps if isinstance(step, OpStep)),
        sizes=plan.sizes,
        primary=plan.primary,
        inputs=tuple(item.name for item in plan.inputs),
        states=plan.states,
        recipes=_counted(_recipe_kind(recipe) for recipe in plan.recipes),
        facts=bundle.facts,
        record=bundle.record(),
        kernels=kernels,
        moved=tuple(moved_table(plan, kernels, sizes=at) for at in sizes or typical_sizes(plan)) if kernels else (),
        passes=pass_uses(bundle, plan),
        natives=native_reports(bundle, plan),
        steps=step_labels(plan)[-len(plan.steps) :] if plan.steps else (),
    )


def _forwards(plan: Plan) -> Iterator[ForwardReport]:
    for variant in plan.forwards:
        num_pieces = sum(isinstance(step, PieceStep) for step in variant.steps)
        yield ForwardReport(variant.name, variant.where.text(), num_pieces, len(variant.steps) - num_pieces)


def _forward_line(forward: ForwardReport) -> str:
    when = forward.when or "all others"
    return f"{forward.name or 'rest':<8} {when}: {forward.num_pieces} pieces, {forward.num_ops} opaque ops"


def _piece(bundle: Bundle, *, piece: UniquePiece, num_uses: int) -> PieceReport:
    artifacts = []
    for entry in piece.ranges:
        file = bundle.artifact_path(entry.artifact).name
        artifacts.append(ArtifactReport(entry.min, entry.max, file=file, size_bytes=bundle.artifacts[file].size))
    return PieceReport(
        fingerprint=piece.fingerprint,
        num_ops=piece.num_ops,
        num_constants=piece.num_constants,
        num_uses=num_uses,
        device=piece.device,
        artifacts=tuple(artifacts),
    )


def _recipe_kind(recipe: Recipe) -> str:
    """Name what the recipe does, such as "take float32" or "concat 3 bfloat16, pack mkldnn_linear"."""
    match recipe.source:
        case Concat(parts):
            source = f"concat {len(parts)}"
        case Stack(_, count):
            source = f"stack {count}"
        case HeadRows():
            source = "rows of heads"
        case HeadProduct():
            source = "product by head"
        case Quantized(layout, part):
            source = f"{part.value} of {layout}"
        case _:
            source = "literal" if recipe.literal else "take"
    return f"{source} {recipe.dtype}" + (f", pack {recipe.pack}" if recipe.pack else "")


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)]) if lines else ""


def _piece_lines(piece: PieceReport, kernels: PieceKernels, *, primary: str) -> list[str]:
    title = f"{piece.num_uses:>6} × {piece.fingerprint[:12]}"
    lines = [f"{title}: {piece.num_ops} ops, {piece.num_constants} constants, {piece.device}"]
    for artifact, (_, _, compiled) in zip(piece.artifacts, kernels.compiled, strict=True):
        span = f"{primary or 'size'} {artifact.min} to {artifact.max}"
        count = f", {spell_count(len(compiled), 'kernel')}" if compiled is not None else ""
        lines.append(f"         {span}: {artifact.file[:12]}…, {spell_bytes(artifact.size_bytes)}{count}")
    return lines


def _state_lines(states: Sequence[State]) -> list[str]:
    """Write equal states once, with the first name as an example."""
    groups: dict[str, list[str]] = {}
    for state in states:
        sizes = "×".join(str(size) for size in state.shape)
        groups.setdefault(f"{sizes} {state.dtype} {state.device}", []).append(state.name)
    return [f"{len(names):>6} × {kind} ({names[0]}{', …' if len(names) > 1 else ''})" for kind, names in groups.items()]


def _fact_lines(facts: Sequence[Fact]) -> list[str]:
    lines = []
    for fact in facts:
        text = str(fact.value)
        short = text[:12] if fact.kind in ("source", "model") else text
        lines.append(f"{fact.kind}/{fact.name} = {short}")
    return lines


def _record_lines(record: Record) -> list[str]:
    return [
        *(f"{name:<32} {seconds:10.3f} s" for name, seconds in record.phases.items()),
        *(f"{name:<32} {count:10d}" for name, count in record.counts.items()),
        *record.notes,
    ]
