"""The order of the passes, turning them off, and what happens when one is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor
from torch.nn.functional import silu

from piecework.compiler.passes.pipeline import Pipeline, make_passes
from piecework.compiler.rewrite.interface import Pass, PassInput, PassResult, named_calls
from piecework.compiler.rewrite.rewritten import Rewritten, as_captured
from piecework.compiler.rewrite.verify import check_form
from piecework.errors import CompileError, InternalError
from piecework.ops.ir.program import Call, Program
from piecework.spec.compile_options import BackendName, CompileOptions
from piecework.spec.passes import PASS_NAMES
from tests.unit.compiler.passes.programs import ROWS, passed, program_of, spec, targets

X = spec(ROWS, 16)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate * 1.0) * up


PROGRAM = program_of(_gated, [X, X])


def test_the_passes_are_those_that_have_names() -> None:
    assert tuple(one.name for one in make_passes()) == PASS_NAMES


def test_each_can_be_turned_off() -> None:
    assert targets(passed(PROGRAM).rewritten.program) == ["piecework.silu_mul.default"]
    without = [name for name in PASS_NAMES if name != "silu_mul"]
    assert targets(passed(PROGRAM, *without).rewritten.program) == ["aten.silu.default", "aten.mul.Tensor"]
    nothing = Pipeline(()).run(PROGRAM)
    assert nothing.rewritten == as_captured(PROGRAM)
    assert nothing.reports == ()


def test_options_choose_them() -> None:
    assert CompileOptions().passes == CompileOptions(backend=BackendName.EAGER).passes == PASS_NAMES
    off = CompileOptions(passes_off=frozenset({"rotary", "no_ops"}))
    assert set(PASS_NAMES) - set(off.passes) == {"rotary", "no_ops"}
    assert off.facts()["passes_off"] == "no_ops,rotary"


def test_an_unknown_pass_is_an_error_that_lists_them() -> None:
    with pytest.raises(CompileError, match="rms_norms") as raised:
        CompileOptions(passes_off=frozenset({"rms_norms"}))
    assert all(name in str(raised.value) for name in PASS_NAMES)


def _wrong(change: str) -> Pass:
    def run(subject: PassInput) -> PassResult:
        made = subject.rewritten
        program = made.program
        changed = {
            "shape": replace(program, outputs=({"n": len(program.calls)},)),
            "order": replace(program, calls=program.calls[::-1]),
            "unknown": replace(program, outputs=({"n": 99},)),
        }[change]
        if change == "shape":
            summed = Call("aten.sum.default", ({"n": 0},), {})
            changed = replace(changed, calls=(*program.calls, summed))
            return PassResult(Rewritten(changed, made.constants, (*made.origins, (0,))))
        return PassResult(replace(made, program=changed))

    return Pass("no_ops", run)


@pytest.mark.parametrize(
    ("change", "why"),
    [("shape", "result 0 would be"), ("order", "reads n 1"), ("unknown", "n 99")],
)
def test_a_pass_that_changes_a_result_is_a_bug(change: str, why: str) -> None:
    with pytest.raises(InternalError, match=why):
        Pipeline(PASS_NAMES, (_wrong(change),)).run(PROGRAM)


def test_constants_are_each_used_once() -> None:
    program = Program((), (), (spec(4), spec(4)), (Call("aten.exp.default", ({"c": 0},), {}),), ({"n": 0},))
    made = as_captured(program)
    check_form(made, program)
    for constants in (((0,), (0,)), ((0, 1),), ((0,),)):
        with pytest.raises(InternalError, match="constants are made of"):
            check_form(replace(made, constants=constants), program)
    with pytest.raises(InternalError, match="origins"):
        check_form(replace(made, origins=()), program)
    with pytest.raises(InternalError, match="no captured call"):
        check_form(replace(made, origins=((7,),)), program)


def test_numbers_of_calls_for_people() -> None:
    assert named_calls([3]) == "call 3"
    assert named_calls([3, 4, 5, 9]) == "calls 3-5, 9"
