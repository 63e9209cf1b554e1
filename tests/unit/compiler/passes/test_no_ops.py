"""What is left out, at all sizes, and what only looks as if it did nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from piecework.ops.ir.program import Call, Program
from tests.unit.compiler.passes.programs import (
    ROWS,
    SYMBOLS,
    assert_same_results,
    passed,
    program_of,
    report,
    spec,
    targets,
)

X = spec(ROWS, 16)

NOTHING: dict[str, Callable[[Tensor], Any]] = {
    "an axis and back": lambda x: x.unsqueeze(0).squeeze(0).exp(),
    "two axes and back": lambda x: x.unsqueeze(0).unsqueeze(0).squeeze(0).squeeze(0).exp(),
    "turned and back": lambda x: x.transpose(0, 1).transpose(0, 1).exp(),
    "a factor of 1": lambda x: (x * 1.0).exp(),
    "a factor of one, an integer": lambda x: (x * 1).exp(),
    "a divisor of 1": lambda x: (x / 1.0).exp(),
    "all of it": lambda x: x[:, 0:16].exp(),
    "all rows": lambda x: x[0:64].exp(),
    "its own shape": lambda x: x.view(x.shape).exp(),
    "expanded to itself": lambda x: x.expand(x.shape).exp(),
    "a copy": lambda x: x.clone().exp(),
    "a cast to its dtype": lambda x: torch.ops.aten._to_copy(x, dtype=torch.float32).exp(),
    "detached": lambda x: torch.ops.aten.alias(x).exp(),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_does_nothing_is_left_out(name: str) -> None:
    program = program_of(NOTHING[name], [X])
    made = passed(program, "no_ops")
    assert targets(made.rewritten.program) == ["aten.exp.default"]
    assert made.rewritten.origins == ((len(program.calls) - 1,),)
    assert_same_results(program, made.rewritten.program)


SOMETHING: dict[str, Callable[[Tensor], Any]] = {
    "most rows": lambda x: x[0:63].exp(),
    "most rows of a few": lambda x: x[0:11].exp(),
    "most columns": lambda x: x[:, 0:15].exp(),
    "a factor": lambda x: (x * 2.0).exp(),
    "turned once": lambda x: x.transpose(0, 1).exp(),
    "a real copy": lambda x: x.transpose(0, 1).contiguous().exp(),
    "a cast": lambda x: x.to(torch.bfloat16).exp(),
    "rounded and back": lambda x: x.to(torch.bfloat16).float().exp(),
    "added to 0": lambda x: (x + 0.0).exp(),
}


@pytest.mark.parametrize("name", SOMETHING)
def test_what_does_something_stays(name: str) -> None:
    program = program_of(SOMETHING[name], [X])
    assert passed(program, "no_ops").rewritten.program is program


def test_a_factor_of_1_that_changes_the_dtype_stays() -> None:
    program = program_of(lambda x: (x * 1.0).exp(), [spec(ROWS, 16, dtype="int64")])
    assert passed(program, "no_ops").rewritten.program is program


def test_sizes_that_only_some_batches_have() -> None:
    """A slice of 7 rows is all of it for up to 7 rows, and the pass tries 7 and 5 of 1 to 64."""
    program = program_of(lambda x: x[0:7].exp(), [X])
    assert passed(program, "no_ops").rewritten.program is program


def test_results_of_a_piece_stay_apart() -> None:
    exp = Call("aten.exp.default", ({"i": 0},), {})
    alias = Call("aten.alias.default", ({"n": 0},), {})
    program = Program(SYMBOLS, (X,), (), (exp, alias, alias), ({"n": 1}, {"n": 2}))
    made = passed(program, "no_ops")
    assert targets(made.rewritten.program) == ["aten.exp.default", "aten.alias.default"]
    assert len({str(output) for output in made.rewritten.program.outputs}) == 2
    (why,) = report(made, "no_ops").near_misses
    assert "two results of the piece one" in why


def test_a_result_is_no_input() -> None:
    program = Program(SYMBOLS, (X,), (), (Call("aten.alias.default", ({"i": 0},), {}),), ({"n": 0},))
    made = passed(program, "no_ops")
    assert made.rewritten.program.calls == program.calls
    assert "an input of the piece one of its results" in report(made, "no_ops").near_misses[0]
