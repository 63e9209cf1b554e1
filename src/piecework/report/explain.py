"""Why pieces are shared or not: a report as data, which is written as text for people and as JSON for machines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from piecework.bundle import Bundle
from piecework.bundle.format import EXPLANATION
from piecework.bundle.manifest import corrupt
from piecework.bundle.plan import PieceStep, Plan
from piecework.report.explain_text import groups_section, head_line, ops_section, pair_section, pieces_section
from piecework.report.layers import find_stacks
from piecework.report.lifting import NameCounts, OpLifting, count_names, lift_report
from piecework.report.pairs import PairReport, compare_layers
from piecework.report.sharing import PieceSharing, StackSharing, share_layers, share_pieces
from piecework.report.subject import ExplainedPlan, Explanation

RECOMPILE = "compile it again to have the first difference named, with its source line"


@dataclass(frozen=True)
class ExplainReport:
    """Why pieces are shared or not.

    Args:
        name: what was explained.
        origin: where its pieces come from.
        num_pieces: how many of the plan's steps run a piece, those of all forwards.
        has_programs: whether the pieces' operators are known, or only how many they are.
        pieces: the pieces that are structurally different.
        stacks: layers, and which of them share their pieces.
        pairs: the two layers that were asked for, in every stack that has both.
        ops: the opaque ops, with what differs between their calls.
        names: how many calls take a name that differs between calls.
        notes: remarks.
    """

    name: str
    origin: str
    num_pieces: int
    has_programs: bool
    pieces: tuple[PieceSharing, ...]
    stacks: tuple[StackSharing, ...]
    pairs: tuple[PairReport, ...]
    ops: tuple[OpLifting, ...]
    names: NameCounts
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value

    def to_text(self, *, everything: bool = False) -> str:
        """Return the report as lines for people.

        Args:
            everything: whether every group of layers and every difference is named, and not only the first ones.
        """
        sections = [self._head()]
        if self.pairs:
            sections += [pair_section(pair) for pair in self.pairs]
        else:
            sections += [
                pieces_section(self.pieces, self.stacks, everything=everything),
                *(groups_section(stack, everything=everything) for stack in self.stacks),
                ops_section(self.ops),
            ]
        return "\n\n".join(section for section in sections if section)

    def _head(self) -> str:
        lines = [
            head_line("explained", self.name),
            head_line("from", self.origin),
            head_line("pieces", f"{self.num_pieces}, of which {len(self.pieces)} unique"),
        ]
        total = self.names.lifted + self.names.baked
        if total:
            cost = "at no cost" if not self.names.baked else f"and {self.names.baked} baked into pieces"
            lines.append(head_line("names lifted", f"{self.names.lifted} of {total}, {cost}"))
        if not self.stacks:
            lines.append(head_line("layers", "none: no two elements of a module list bind tensors"))
        lines += [head_line("note", note) for note in self.notes]
        return "\n".join(lines)


def explain_subject(subject: ExplainedPlan, *, layers: tuple[int, int] | None = None) -> ExplainReport:
    """Return why the pieces of a plan are shared or not.

    Args:
        subject: what to explain.
        layers: two layers to compare piece by piece.

    Raises PieceworkError where no stack has both layers.
    """
    return ExplainReport(
        name=subject.name,
        origin=subject.origin,
        num_pieces=sum(isinstance(step, PieceStep) for step in subject.plan.all_steps),
        has_programs=subject.explanation is not None,
        pieces=share_pieces(subject, find_stacks(subject.plan)),
        stacks=share_layers(subject),
        pairs=compare_layers(subject, layers) if layers is not None else (),
        ops=lift_report(subject),
        names=count_names(subject),
        notes=subject.notes,
    )


def explain_bundle(bundle: Bundle, *, layers: tuple[int, int] | None = None) -> ExplainReport:
    """Return why the pieces of a bundle are shared or not; arguments and errors as for `explain_subject`.

    Raises CorruptBundle where its plan or its explanation isn't one.
    """
    return explain_subject(bundle_subject(bundle), layers=layers)


def bundle_subject(bundle: Bundle) -> ExplainedPlan:
    """Return what to explain of a bundle; one without explanation gets a note. Raises CorruptBundle."""
    plan = Plan.from_json(bundle.plan())
    explanation = _read_explanation(bundle, plan)
    return ExplainedPlan(
        name=str(bundle.path),
        origin="the bundle",
        plan=plan,
        explanation=explanation,
        notes=() if explanation else (f"the bundle doesn't hold its pieces' programs: {RECOMPILE}",),
    )


def _read_explanation(bundle: Bundle, plan: Plan) -> Explanation | None:
    data = bundle.explanation()
    if data is None:
        return None
    try:
        explanation = Explanation.from_json(data)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        found = f"is malformed: {type(error).__name__} {error}"
        raise corrupt(EXPLANATION, bundle=str(bundle.path), found=found) from error
    fingerprints = [listing.program.fingerprint() for listing in explanation.listings]
    if fingerprints != [piece.fingerprint for piece in plan.pieces]:
        raise corrupt(EXPLANATION, bundle=str(bundle.path), found="explains other pieces than those of the plan")
    return explanation
