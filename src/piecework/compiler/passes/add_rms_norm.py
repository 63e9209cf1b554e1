"""A sum that is normed and read elsewhere too becomes `add_rms_norm`.

before: total = residual + x; rms_norm(total, weight, eps)      with total read by others too: the next residual
after:  piecework::add_rms_norm(x, residual, weight, eps)       which gives the norm and the sum

Applies to sums of two tensors of one shape, strides and dtype. x is the one that was computed last: the other is a
result of the layer before, and in its memory nothing may be written in most pieces. A near miss is a sum of other
shapes, a scaled one, and one that nothing else reads: there the norm alone does it.
"""

from __future__ import annotations

from typing import Any, Final

from piecework.compiler.rewrite.interface import NearMiss, Pass, PassInput, PassResult
from piecework.compiler.rewrite.metas import form
from piecework.compiler.rewrite.rewritten import Fused, fuse, results_used
from piecework.ops.ir.program import Call, references
from piecework.spec.passes import ADD_RMS_NORM

_NORM: Final = "piecework.rms_norm.default"
_ADD: Final = "aten.add.Tensor"
_FUSED: Final = "piecework.add_rms_norm.default"


def add_rms_norm(subject: PassInput) -> PassResult:
    """Fuse what can be."""
    program = subject.rewritten.program
    users = results_used(program)
    fused: list[Fused] = []
    taken: set[int] = set()
    matches: list[str] = []
    near_misses: list[NearMiss] = []
    for number, call in enumerate(program.calls):
        given = call.args[0] if call.target == _NORM and call.args else None
        total = given.get("n", -1) if isinstance(given, dict) else -1
        if total < 0 or program.calls[total].target != _ADD:
            continue
        name = f"add_rms_norm: {subject.named(sorted([total, number]))}"
        why = _refused(subject, total, read=users[total] - {number})
        if why is None and total in taken:
            why = "the sum has a norm already"
        if why is not None:
            near_misses.append(NearMiss(f"{name} stay apart: {why}"))
            continue
        taken.add(total)
        x, residual = sorted(program.calls[total].args, key=_when, reverse=True)
        made = Call(_FUSED, (x, residual, *call.args[1:]), call.kwargs)
        fused.append(Fused(made, (number, total), frozenset({number, total})))
        matches.append(f"{name}, a sum that is read by {_named(subject, users[total] - {number})} too")
    return PassResult(fuse(subject.rewritten, fused), tuple(matches), tuple(near_misses))


def make_pass() -> Pass:
    """Return the pass."""
    return Pass(ADD_RMS_NORM, add_rms_norm)


def _refused(subject: PassInput, total: int, *, read: set[int]) -> str | None:
    call = subject.rewritten.program.calls[total]
    if call.kwargs or len(call.args) != 2 or not all(_is_reference(argument) for argument in call.args):
        return "it is no sum of two tensors"
    for run in subject.runs:
        forms = [form(run.of(value)) for value in (*call.args, {"n": total})]
        if any(other != forms[0] for other in forms):
            return "the sum is of tensors of different shapes, strides or dtypes"
    return None if read else "nothing else reads the sum"


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and any(True for _ in references(value))


def _when(value: Any) -> int:
    """Return when a value is there: the number of its call, or -1 for what the piece is given."""
    return int(value.get("n", -1))


def _named(subject: PassInput, numbers: set[int]) -> str:
    calls = subject.named(frozenset(n for n in numbers if n >= 0)) if numbers - {-1} else ""
    return " and ".join(filter(None, [calls, "the piece's caller" if -1 in numbers else ""]))
