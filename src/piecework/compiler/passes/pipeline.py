"""The order of the passes, and what happens between them: each one's work is checked before the next begins.

Views and factors that do nothing go first, because they stand between what belongs together. Then spellings become
ops: a layer norm before the RMS norm that is inside of it, and sums with norms when these are ops. Linear layers are
merged when nothing looks for their results any more. Lowering (`compiler/passes/lower.py`) is last, and has choices of
its own.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import final

from piecework.compiler.passes import (
    add_rms_norm,
    gated,
    layer_norm,
    merge_linear,
    no_ops,
    rms_norm,
    rotary,
    rotate_pairs,
)
from piecework.compiler.rewrite.interface import Pass, PassInput, PassReport, PassResult
from piecework.compiler.rewrite.metas import ERRORS, NUM_TYPICAL, MetaRun, run_on_metas, typical_sizes
from piecework.compiler.rewrite.rewritten import Rewritten, as_captured
from piecework.compiler.rewrite.verify import check_form, compare_runs
from piecework.errors import InternalError
from piecework.foundation.torch_private import operator_of
from piecework.ops.ir.program import Program
from piecework.ops.ir.provider_order import IR_OPS
from piecework.ops.ir.resolve import resolve_target


def make_passes() -> tuple[Pass, ...]:
    """Return all passes in their order, as `PASS_NAMES` has them; what they have traced, they keep."""
    return (
        no_ops.make_pass(),
        layer_norm.make_pass(),
        rms_norm.make_pass(),
        gated.make_silu(),
        gated.make_gelu(),
        rotary.make_pass(),
        rotate_pairs.make_pass(),
        add_rms_norm.make_pass(),
        merge_linear.make_pass(),
    )


@dataclass(frozen=True)
class Passed:
    """A program after all passes, and what each of them did."""

    rewritten: Rewritten
    reports: tuple[PassReport, ...]


@final
@dataclass
class Pipeline:
    """Runs passes over a model's pieces.

    Args:
        names: which ones, see `PASS_NAMES`; their order is the pipeline's own.
    """

    names: Collection[str]
    _passes: tuple[Pass, ...] = field(default_factory=make_passes)

    def run(self, program: Program, *, strict_outputs: frozenset[int] = frozenset()) -> Passed:
        """Run the passes over a program.

        Args:
            program: a piece's, as it was captured.
            strict_outputs: positions of results that must keep their strides.

        Raises InternalError where a pass changed a result.
        """
        made = as_captured(program)
        passes = [one for one in self._passes if one.name in self.names]
        if not passes:
            return Passed(made, ())
        runs = _runs_of_captured(program)
        if isinstance(runs, str):
            unchanged = len(program.calls), len(program.calls)
            return Passed(made, tuple(PassReport(one.name, (), (runs,), *unchanged) for one in passes))
        outcomes: list[tuple[Pass, PassInput, PassResult]] = []
        for one in passes:
            subject = PassInput(made, runs, strict_outputs)
            outcome = one.run(subject)
            if outcome.rewritten.program is not made.program:
                runs = _checked(one.name, subject, outcome, captured=program)
            outcomes.append((one, subject, outcome))
            made = outcome.rewritten
        fused = {origin for number in _ops(made.program) for origin in made.origins[number]}
        return Passed(made, tuple(_report(*given, fused=fused) for given in outcomes))


def _runs_of_captured(program: Program) -> tuple[MetaRun, ...] | str:
    """Return the runs of a program, or why no pass may touch it."""
    for number, call in enumerate(program.calls):
        operator = operator_of(resolve_target(call.target))
        if operator is not None and operator.mutates:
            return f"call {number}, {call.target}, writes to its argument, so that no call may move"
    try:
        return _runs(program, program)
    except ERRORS as error:  # operators that know no tensors without values
        return f"the piece can't be run without values: {str(error).splitlines()[0]}"


def _ops(program: Program) -> list[int]:
    """Return the calls of the IR's ops."""
    known = [f"piecework.{name}." for name in IR_OPS]
    return [n for n, call in enumerate(program.calls) if call.target.startswith(tuple(known))]


def _report(one: Pass, subject: PassInput, outcome: PassResult, *, fused: Collection[int]) -> PassReport:
    missed = [near.why for near in outcome.near_misses if not near.calls or not set(near.calls) <= set(fused)]
    sizes = len(subject.rewritten.program.calls), len(outcome.rewritten.program.calls)
    return PassReport(one.name, outcome.matches, tuple(missed), *sizes)


def _runs(program: Program, captured: Program) -> tuple[MetaRun, ...]:
    return tuple(run_on_metas(program, typical_sizes(captured, choice)) for choice in range(NUM_TYPICAL))


def _checked(name: str, subject: PassInput, outcome: PassResult, *, captured: Program) -> tuple[MetaRun, ...]:
    """Return the runs of a pass's program. Raises InternalError where it doesn't give what the one before did."""
    check_form(outcome.rewritten, captured)
    before, after = subject.rewritten.program, outcome.rewritten.program
    try:
        runs = _runs(after, captured)
    except ERRORS as error:
        raise InternalError(f"the pass {name} made a piece that can't be run: {error}") from error
    wrong = compare_runs(subject.runs, runs, before=before, after=after, strict_outputs=subject.strict_outputs)
    if wrong is not None:
        raise InternalError(f"the pass {name} changed a piece: {wrong}")
    return runs
