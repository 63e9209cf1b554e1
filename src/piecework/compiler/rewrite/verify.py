"""Check that a pass left a piece's results as they were: shapes, types and, where it matters, strides.

Both programs run on tensors without values, with numbers in the place of their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

from piecework.compiler.rewrite.metas import ERRORS, NUM_TYPICAL, MetaRun, form, run_on_metas, typical_sizes
from piecework.compiler.rewrite.rewritten import Rewritten
from piecework.errors import InternalError
from piecework.ops.ir.program import Program, references


def same_results(before: Program, after: Program, *, strict_outputs: frozenset[int]) -> str | None:
    """Return what differs, for people, or None where nothing does; sizes are tried at two values each.

    Args:
        before, after: the programs.
        strict_outputs: positions of results whose strides must be the same.
    """
    for choice in range(NUM_TYPICAL):
        sizes = typical_sizes(before, choice)
        try:
            old, new = run_on_metas(before, sizes), run_on_metas(after, sizes)
        except ERRORS as error:
            return str(error).splitlines()[0]
        wrong = compare_runs([old], [new], before=before, after=after, strict_outputs=strict_outputs)
        if wrong is not None:
            return wrong
    return None


def compare_runs(
    old: Sequence[MetaRun],
    new: Sequence[MetaRun],
    *,
    before: Program,
    after: Program,
    strict_outputs: frozenset[int],
) -> str | None:
    """Return what differs between the results of two programs that ran at the same sizes; see `same_results`."""
    for a_run, b_run in zip(old, new, strict=True):
        pairs = zip(before.outputs, after.outputs, strict=True)
        for position, (a, b) in enumerate((a_run.of(x), b_run.of(y)) for x, y in pairs):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"result {position} would be {b.dtype} {list(b.shape)} instead of {a.dtype} {list(a.shape)}"
            if position in strict_outputs and form(a) != form(b):
                return f"another piece reads result {position}, whose strides would be {b.stride()}"
    return None


def check_form(made: Rewritten, captured: Program) -> None:
    """Raise InternalError where a rewritten program is none, or doesn't say what of the captured one it is made of.

    Every call reads only what is there before it, every constant is made of captured ones, each of which is used once,
    and origins are numbers of captured calls.
    """
    program = made.program
    limits = {"i": len(program.inputs), "c": len(program.constants)}
    for number, call in enumerate(program.calls):
        for kind, index in references([*call.args, *call.kwargs.values()]):
            if not 0 <= index < (number if kind == "n" else limits[kind]):
                raise InternalError(f"call {number}, {call.target}, reads {kind} {index}")
    for output in program.outputs:
        for kind, index in references(output):
            if not 0 <= index < (len(program.calls) if kind == "n" else limits[kind]):
                raise InternalError(f"a result of the piece is {kind} {index}")
    made_of = sorted(index for constants in made.constants for index in constants)
    if len(made.constants) != limits["c"] or made_of != list(range(len(captured.constants))):
        raise InternalError(f"constants are made of {made.constants}, of {len(captured.constants)}")
    if len(made.origins) != len(program.calls):
        raise InternalError(f"{len(made.origins)} origins of {len(program.calls)} calls")
    if any(not 0 <= k < len(captured.calls) for origin in made.origins for k in origin):
        raise InternalError("an origin that is no captured call")
