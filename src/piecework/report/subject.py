"""What is explained: a plan, with the programs of its unique pieces where they are known."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from piecework.bundle.plan import Instance, PieceStep, Plan, Recipe
from piecework.report.differences import Difference, find_difference
from piecework.report.listing import Listing, join_names

VERSION: Final = 1


@dataclass(frozen=True)
class Explanation:
    """What a compile says of its unique pieces and opaque ops, beside the plan.

    Args:
        listings: one per unique piece, without names of constants: those are an instance's, and in the plan.
        op_arguments: names of each opaque op's arguments, in order.
        op_locations: source lines that call each opaque op.
        ir_ops: for each unique piece, its calls of IR ops, as `passes.lower.CallSite.to_json` writes them.
        passes: for each unique piece, what each pass did, as `passes.interface.PassReport.to_json` writes it.
        kernels: for each unique piece, those that it would have with each operator by itself
        (report/kernel_counts.py), as it
            was captured, after passes and lowered: {"captured": …, "passed": …, "lowered": …}; None is not known.
    """

    listings: tuple[Listing, ...]
    op_arguments: Mapping[str, Sequence[str]] = field(default_factory=dict)
    op_locations: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ir_ops: tuple[tuple[Mapping[str, Any], ...], ...] = ()
    passes: tuple[tuple[Mapping[str, Any], ...], ...] = ()
    kernels: tuple[Mapping[str, Any], ...] = ()

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Explanation:
        """Read the content of explain.json (see `to_json`). Raises KeyError, TypeError, ValueError, IndexError."""
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']}, where {VERSION} was expected")
        lines, arguments = data["locations"], dict(data["arguments"])

        def located(numbers: Sequence[int]) -> tuple[str, ...]:
            return tuple(lines[number] if number >= 0 else "" for number in numbers)

        listings = [
            Listing.from_json({**piece, "locations": located(piece["at"]), "arguments": arguments})
            for piece in data["pieces"]
        ]
        return Explanation(
            listings=tuple(listings),
            op_arguments={name: tuple(op["arguments"]) for name, op in data["ops"].items()},
            op_locations={name: located(op["at"]) for name, op in data["ops"].items()},
            ir_ops=tuple(tuple(sites) for sites in data.get("ir_ops", ())),
            passes=tuple(tuple(reports) for reports in data.get("passes", ())),
            kernels=tuple(data.get("kernels", ())),
        )

    def to_json(self) -> dict[str, Any]:
        """Return compact JSON: every source line is written once, and a call has its number, or -1."""
        lines: dict[str, int] = {"": -1}

        def numbers(locations: Sequence[str]) -> list[int]:
            return [lines.setdefault(line, len(lines) - 1) for line in locations]

        pieces = [
            {
                **listing.program.to_json(),
                "at": numbers(listing.locations),
                "sizes": dict(listing.sizes),
                "primary": listing.primary,
            }
            for listing in self.listings
        ]
        ops = {
            name: {"arguments": list(arguments), "at": numbers(self.op_locations.get(name, ()))}
            for name, arguments in self.op_arguments.items()
        }
        arguments = {k: list(v) for listing in self.listings for k, v in listing.arguments.items()}
        return {
            "version": VERSION,
            "locations": [line for line in lines if line],
            "arguments": arguments,
            "pieces": pieces,
            "ops": ops,
            "ir_ops": [[dict(site) for site in sites] for sites in self.ir_ops],
            "passes": [[dict(report) for report in reports] for reports in self.passes],
            "kernels": [dict(stages) for stages in self.kernels],
        }


@dataclass(frozen=True)
class ExplainedPlan:
    """What is explained.

    Args:
        name: how to name it.
        origin: where the pieces come from, in words.
        plan: its plan; artifacts may be left out.
        explanation: of the plan's unique pieces, or None where nobody wrote it down.
        notes: remarks for people.
    """

    name: str
    origin: str
    plan: Plan
    explanation: Explanation | None = None
    notes: tuple[str, ...] = ()

    def instance(self, step: int) -> Instance:
        """Return the instance that step number `step` runs."""
        found = self.plan.steps[step]
        assert isinstance(found, PieceStep)
        return self.plan.instances[found.instance]

    def piece(self, step: int) -> int:
        """Return which unique piece step number `step` runs."""
        return self.instance(step).piece

    def difference(self, a: int, b: int) -> Difference | None:
        """Return the first difference between the pieces of steps `a` and `b`, or None where they share one.

        Without their programs it is told by what the plan knows: how many operators, and the constants' shapes.
        """
        mine, theirs = self.instance(a), self.instance(b)
        if mine.piece == theirs.piece:
            return None
        if self.explanation is None:
            return Difference(_by_counts(self.plan, mine, theirs))
        listings = [
            replace(self.explanation.listings[i.piece], names=[c.name for c in self.plan.captured_constants(i)])
            for i in (mine, theirs)
        ]
        return find_difference(listings[0], listings[1]) or Difference("nothing that their programs show")


def piece_letter(index: int) -> str:
    """Name a unique piece for people: A, B, … Z, AA, AB, …"""
    letters = string.ascii_uppercase
    return (piece_letter(index // 26 - 1) if index >= 26 else "") + letters[index % 26]


def _by_counts(plan: Plan, mine: Instance, theirs: Instance) -> str:
    p, q = plan.pieces[mine.piece], plan.pieces[theirs.piece]
    found = []
    if p.num_ops != q.num_ops:
        found.append(f"different number of operators: {p.num_ops} against {q.num_ops}")
    if p.num_constants != q.num_constants:
        found.append(f"different number of constants: {p.num_constants} against {q.num_constants}")
    pairs = zip(plan.captured_constants(mine), plan.captured_constants(theirs), strict=False)
    differing = next((text for text in (_by_recipe(x, y) for x, y in pairs) if text), "")
    if differing and p.num_constants == q.num_constants:
        found.append(differing)
    return "; ".join(found) or "not in the number of operators, nor in the constants' shapes"


def _by_recipe(x: Recipe, y: Recipe) -> str:
    if x.shape != y.shape:
        return f"shape {list(x.shape)} against {list(y.shape)} of {join_names(x.name, y.name)}"
    return "" if x.dtype == y.dtype else f"dtype {x.dtype} against {y.dtype} of {join_names(x.name, y.name)}"
