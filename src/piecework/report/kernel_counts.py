"""How many kernels run and how many bytes they move: per layer, before and after passes, and as compiled.

Four stages are compared. *Captured*: every operator of the model's graph by itself, as eager torch runs it. *After
passes*: the same of the piece that passes left, where an IR op is one kernel. *Lowered*: of the program that the
backend is given, in which native bodies are written out. *Compiled*: what the backend made of that, nests of loops and
calls of libraries. A kernel moves what it reads of weights, what else it reads, and what it writes, each tensor once
(foundation/traffic.py). What opaque ops move is not known here: each is one call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from piecework.bundle import Bundle
from piecework.bundle.format import EXPLANATION
from piecework.bundle.manifest import corrupt
from piecework.bundle.plan import OpStep, PieceStep, Plan
from piecework.bundle.sizes import size_expression
from piecework.bundle.where import Where
from piecework.errors import PieceworkError
from piecework.foundation.notes import KERNELS, read_note
from piecework.foundation.traffic import Kernel, Term, kernels_from_json, kernels_to_json
from piecework.report.layers import Layer, find_stacks
from piecework.report.spelling import spell_bytes, spell_numbers

MOVED: Final = "kernels: bytes of weights + of all else"
STAGES: Final = ("captured", "after passes", "lowered", "compiled")
_SHOWN: Final = (0, 1, 3)
"""The stages in the text: lowering by itself is of interest to backends only."""

TYPICAL: Final = (1, 32)
"""Values of the primary size that are shown where none are asked for: one token, and a small batch."""

_SYMBOL: Final = re.compile(r"\bs\d+\b")
_VIEWS: Final = frozenset({"piecework::rows.default"})
"""Opaque ops that return a part of their argument: a view, or a copy of a few rows."""

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Moved:
    """A number of kernels, and the bytes of weights that they read and of all else; None is not known."""

    kernels: int | None
    weight_bytes: int | None
    other_bytes: int | None


NOTHING: Final = Moved(0, 0, 0)
UNKNOWN: Final = Moved(None, None, None)


@dataclass(frozen=True)
class MovedRow:
    """What a part of a forward moves.

    Args:
        forward: which, "" for the one of batches that no other is for.
        part: of the forward: "layers", "no layer" for what else there is, or "in all".
        stack: the layers' list, such as "model.layers", else "".
        layers: numbers of the layers that each move as much, else ().
        stages: as `STAGES`.
        num_calls: how many opaque ops are called.
    """

    forward: str
    part: str
    stack: str
    layers: tuple[int, ...]
    stages: tuple[Moved, ...]
    num_calls: int


@dataclass(frozen=True)
class MovedTable:
    """What is moved at some sizes; of each forward its layers, then what is no layer, then all of it."""

    sizes: dict[str, int]
    rows: tuple[MovedRow, ...]


@dataclass(frozen=True)
class PieceKernels:
    """The kernels of a unique piece in all stages; None is not known. Sizes have the model's names.

    Args:
        captured: of the piece as it was captured.
        passed: after passes.
        lowered: of what the backend is given.
        compiled: by the range of the primary size, (min, max).
    """

    captured: tuple[Kernel, ...] | None
    passed: tuple[Kernel, ...] | None
    lowered: tuple[Kernel, ...] | None
    compiled: tuple[tuple[int, int, tuple[Kernel, ...] | None], ...]

    def moved(self, sizes: Sizes, *, primary: int) -> tuple[Moved, ...]:
        """Return what the piece moves in each stage at some sizes, the primary one among them."""
        forms = [kernels for low, high, kernels in self.compiled if low <= primary <= high]
        compiled = forms[0] if forms else None
        return tuple(_moved(kernels, sizes) for kernels in (self.captured, self.passed, self.lowered, compiled))

    def to_json(self) -> dict[str, object]:
        """Return the kernels as JSON: each as name, bytes of weights, of what else is read, and of what is written."""
        return {
            "captured": _kernels_json(self.captured),
            "after_passes": _kernels_json(self.passed),
            "lowered": _kernels_json(self.lowered),
            "compiled": [[low, high, _kernels_json(kernels)] for low, high, kernels in self.compiled],
        }


def piece_kernels(bundle: Bundle, plan: Plan) -> tuple[PieceKernels, ...]:
    """Return the kernels of a bundle's unique pieces. Raises CorruptBundle where what it says of them isn't that."""
    explanation = bundle.explanation() or {}
    made = []
    try:
        for index, piece in enumerate(plan.pieces):
            noted = dict(_at(explanation.get("kernels", ()), index) or {})
            names = dict((_at(explanation.get("pieces", ()), index) or {}).get("sizes", {}))
            lowered = _read(noted.get("lowered"), names)
            compiled = [
                (form.min, form.max, _of_artifact(bundle, form.artifact, names=names, lowered=lowered))
                for form in piece.ranges
            ]
            captured, passed = (_read(noted.get(stage), names) for stage in ("captured", "passed"))
            made.append(PieceKernels(captured, passed, lowered, tuple(compiled)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise corrupt(EXPLANATION, bundle=str(bundle.path), found="does not say which kernels pieces have") from error
    return tuple(made)


def moved_table(plan: Plan, pieces: Sequence[PieceKernels], *, sizes: Sizes) -> MovedTable:
    """Return what a plan's forwards move.

    Args:
        plan: the plan.
        pieces: of its unique pieces.
        sizes: values of some of its sizes. The others are as large as the primary one, or what a forward says of them.

    Raises PieceworkError where the plan has no such size or it can't be that.
    """
    for name, value in sizes.items():
        low, high = plan.sizes.get(name, (0, -1))
        if not low <= value <= high:
            raise PieceworkError(
                asked=f"what is moved at {name} = {value}",
                found=", ".join(f"{n} from {lo} to {hi}" for n, (lo, hi) in plan.sizes.items()) or "no dynamic sizes",
                try_="a size that the bundle has, within its range",
            )
    rows: list[MovedRow] = []
    for variant in plan.forwards:
        if any(not low <= sizes.get(name, low) <= high for name, low, high in variant.where.within):
            continue
        found = _all_sizes(plan, sizes, where=variant.where)
        forward = replace(plan, variants=(), steps=variant.steps)
        rows += _forward_rows(forward, pieces, variant.name, found)
    return MovedTable(dict(sizes), tuple(rows))


def typical_sizes(plan: Plan) -> tuple[dict[str, int], ...]:
    """Return the sizes that are shown where none are asked for."""
    if not plan.primary:
        return ({},)
    low, high = plan.sizes[plan.primary]
    return tuple({plan.primary: n} for n in dict.fromkeys(max(low, min(high, n)) for n in TYPICAL))


def table_lines(table: MovedTable) -> list[str]:
    """Write a table for people."""
    at = ", ".join(f"{name} = {value}" for name, value in table.sizes.items())
    named = len({row.forward for row in table.rows}) > 1
    stacks = len({row.stack for row in table.rows if row.layers}) > 1
    cells: list[tuple[str, ...]] = [("at " + at if at else "", *(STAGES[n] for n in _SHOWN), "opaque ops")]
    for row in table.rows:
        label = f"{row.forward or 'rest'}: " if named else ""
        if row.layers:
            which = f" of {row.stack}" if stacks else ""
            label += f"layer{'s' if len(row.layers) > 1 else ''} {spell_numbers(row.layers)}{which}"
            label += ", each" if len(row.layers) > 1 else ""
        else:
            label += row.part
        cells.append((f"  {label}", *(_cell(row.stages[n]) for n in _SHOWN), str(row.num_calls)))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cell(moved: Moved) -> str:
    if moved.kernels is None:
        return "unknown"
    amounts = [spell_bytes(n) if n is not None else "unknown" for n in (moved.weight_bytes, moved.other_bytes)]
    return f"{moved.kernels}: {' + '.join(amounts)}"


def _forward_rows(plan: Plan, pieces: Sequence[PieceKernels], name: str, sizes: Sizes) -> list[MovedRow]:
    primary = sizes.get(plan.primary, 0)
    known = {
        index: pieces[index].moved(sizes, primary=primary)
        for index in {plan.instances[s.instance].piece for s in plan.steps if isinstance(s, PieceStep)}
    }

    def row(part: str, steps: Iterable[int], *, stack: str = "", layers: tuple[int, ...] = ()) -> MovedRow:
        found = [plan.steps[step] for step in steps]
        stages = [known[plan.instances[s.instance].piece] for s in found if isinstance(s, PieceStep)]
        sums = tuple(_sum(stage[number] for stage in stages) for number in range(len(STAGES)))
        calls = sum(isinstance(s, OpStep) and s.op not in _VIEWS for s in found)
        return MovedRow(name, part, stack, layers, sums, calls)

    rows: list[MovedRow] = []
    rest = set(range(len(plan.steps)))
    for stack in find_stacks(plan) if plan.steps else ():
        groups: dict[Any, list[tuple[Layer, list[int]]]] = {}
        for layer in stack.layers:
            ops = [s for s in layer.steps if isinstance(plan.steps[s], OpStep)]
            if layer.own:
                kinds = [plan.instances[plan.steps[s].instance].piece for s in layer.own]  # type: ignore[union-attr]
                steps = [*layer.own, *ops]
                groups.setdefault((tuple(kinds), len(ops)), []).append((layer, steps))
                rest -= set(steps)
        for group in groups.values():
            numbers = tuple(layer.number for layer, _ in group)
            rows.append(row("layers", group[0][1], stack=stack.name, layers=numbers))
    if rows and rest:
        rows.append(row("no layer", rest))
    return [*rows, row("in all", range(len(plan.steps)))]


def _all_sizes(plan: Plan, sizes: Sizes, *, where: Where) -> dict[str, int]:
    primary = sizes.get(plan.primary, TYPICAL[0])
    found = {name: max(low, min(high, primary)) for name, (low, high) in plan.sizes.items()}
    found |= sizes
    for name, low, high in where.within:
        found[name] = max(low, min(high, found[name]))
    for name, other in where.equal:
        found[name] = found[other]
    return found


def _sum(parts: Iterable[Moved]) -> Moved:
    total = NOTHING
    for part in parts:
        total = Moved(
            _plus(total.kernels, part.kernels),
            _plus(total.weight_bytes, part.weight_bytes),
            _plus(total.other_bytes, part.other_bytes),
        )
    return total


def _plus(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def _moved(kernels: tuple[Kernel, ...] | None, sizes: Sizes) -> Moved:
    if kernels is None:
        return UNKNOWN
    weights = [_value(term, sizes) for kernel in kernels for term in kernel.weights]
    others = [_value(term, sizes) for kernel in kernels for term in (*kernel.reads, *kernel.writes)]
    return Moved(len(kernels), _total(weights), _total(others))


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _value(term: Term, sizes: Sizes) -> int | None:
    try:
        return min(size_expression(text)(sizes) for text in term) if term else None
    except (KeyError, ValueError, ZeroDivisionError):
        return None


def _of_artifact(
    bundle: Bundle, artifact: str, *, names: Mapping[str, str], lowered: tuple[Kernel, ...] | None
) -> tuple[Kernel, ...] | None:
    path = bundle.artifact_path(artifact)
    if path.suffix == ".json":  # the eager backend's: operators are run one by one
        return lowered
    try:
        text = read_note(path, mark=KERNELS)
        return _read(json.loads(text), names) if text else None
    except (OSError, ValueError, TypeError):
        return None  # nothing else depends on it, and `--verify` is what finds damage


def _read(data: Any, names: Mapping[str, str]) -> tuple[Kernel, ...] | None:
    """Read kernels whose sizes are a program's symbols; give the sizes the model's names."""
    if data is None:
        return None

    def term(texts: Term) -> Term:
        return tuple(_SYMBOL.sub(lambda m: names.get(m.group(0), m.group(0)), text) for text in texts)

    def terms(group: tuple[Term, ...]) -> tuple[Term, ...]:
        return tuple(term(texts) for texts in group)

    kernels = kernels_from_json(data)
    return tuple(Kernel(k.name, terms(k.weights), terms(k.reads), terms(k.writes)) for k in kernels)


def _kernels_json(kernels: tuple[Kernel, ...] | None) -> list[Any] | None:
    return None if kernels is None else kernels_to_json(kernels)


def _at(items: Any, index: int) -> Any:
    return items[index] if index < len(items) else None
