"""What must not be fused, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from tests.unit.compiler.passes.programs import (
    ROWS,
    assert_same_results,
    ops_of,
    passed,
    program_of,
    report,
    spec,
    targets,
)

X = spec(1, ROWS, 16)
HALF = spec(1, ROWS, 16, dtype="bfloat16")
W = spec(16)
HALF_W = spec(16, dtype="bfloat16")


def _factor(x: Tensor, eps: Any = 1e-6) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * _factor(wide)).to(x.dtype)


def _across(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))


def _cubed(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6))


def _factor_returned(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    factor = _factor(x)
    return weight * (x * factor), factor


def _square_read(x: Tensor, weight: Tensor) -> Tensor:
    squares = x.pow(2)
    return weight * (x * torch.rsqrt(squares.mean(-1, keepdim=True) + 1e-6)) + squares


def _other_tensor(x: Tensor, weight: Tensor) -> Tensor:
    return weight * ((x + 1) * _factor(x))


def _eps_of_a_tensor(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * _factor(x, eps=weight[:1]))


def _half_squares(x: Tensor, weight: Tensor) -> Tensor:
    """The squares are rounded to bfloat16."""
    factor = torch.rsqrt(x.pow(2).float().mean(-1, keepdim=True) + 1e-6)
    return weight * (x.float() * factor).to(x.dtype)


def _other_cast(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * _factor(wide)).to(torch.float16).to(x.dtype)


def _wide_result(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return wide * _factor(wide)


NORMS: dict[str, tuple[Callable[..., Any], Any, Any, str]] = {
    "another axis": (_across, X, W, "call 1 has [1], where it has [-1]"),
    "another power": (_cubed, X, W, "call 0 has 3, where it has 2"),
    "its factor is a result": (_factor_returned, X, W, "what call 3 gives is read by the piece's caller too"),
    "its squares are read": (_square_read, X, W, "what call 0 gives is read by call 6 too"),
    "another tensor": (_other_tensor, X, W, "has another tensor as x"),
    "an eps for each": (_eps_of_a_tensor, X, W, "has a tensor, where it has eps"),
    "squares in half precision": (_half_squares, HALF, HALF_W, "is aten._to_copy.default, where it has"),
    "a cast to another dtype": (_other_cast, HALF, HALF_W, ""),
    "a wide weight": (_rms, HALF, W, "call 7 gives float32[1, 7, 16], the op bfloat16[1, 7, 16]"),
    "a wide result": (_wide_result, HALF, HALF_W, ""),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_that_are_none(name: str) -> None:
    norm, x, weight, why = NORMS[name]
    program = program_of(norm, [x, weight], weights=1)
    made = passed(program, "rms_norm")
    assert_same_results(program, made.rewritten.program)
    misses = report(made, "rms_norm").near_misses
    if name == "a wide weight":  # the part before the weight is one
        assert [call.args for call in made.rewritten.program.calls if "rms_norm" in call.target] == [
            ({"i": 0}, None, 1e-6)
        ]
        return
    if not why:  # a cast, and a norm in float32
        assert targets(made.rewritten.program)[:2] == ["aten._to_copy.default", "piecework.rms_norm.default"]
        return
    assert ops_of(made) == []
    assert len(misses) == 1
    assert why in misses[0]
    assert misses[0].startswith("rms_norm: calls ")


def test_a_weight_that_is_no_row() -> None:
    for shape in ((3, 16), (1,)):
        program = program_of(_rms, [spec(3, 16), spec(*shape)], weights=1)
        made = passed(program, "rms_norm")
        assert [c.args[1] for c in made.rewritten.program.calls if "rms_norm" in c.target] == [None]
        assert_same_results(program, made.rewritten.program)


def test_the_better_reason_is_told() -> None:
    """Of all spellings, the one of which most is there."""
    program = program_of(_square_read, [HALF, HALF_W], weights=1)
    (why,) = report(passed(program, "rms_norm"), "rms_norm").near_misses
    assert "nearly" in why


GATES: dict[str, tuple[Callable[..., Any], str]] = {
    "read elsewhere": (lambda a, b: (silu(a) * b, silu(a)), "is read by the piece's caller too"),
    "broadcast": (lambda a, b: silu(a[..., :1]) * b, "the gate is [1, 7, 1], what it is for [1, 7, 16]"),
    "scaled": (lambda a, b: silu(a) * 2.0 + b, "up of call 1 is 2.0, no tensor of float32"),
    "summed": (lambda a, b: silu(a) + b, ""),
    "another gelu": (lambda a, b: gelu(a, approximate="tanh") + b, ""),
}


@pytest.mark.parametrize("name", GATES)
def test_gates_that_are_none(name: str) -> None:
    gate, why = GATES[name]
    program = program_of(gate, [X, X])
    made = passed(program, "silu_mul", "gelu_mul")
    assert made.rewritten.program is program
    misses = [miss for found in made.reports for miss in found.near_misses]
    assert len(misses) == bool(why)
    assert all(why in miss for miss in misses)


def test_halves_of_one_tensor_and_a_gate_that_is_its_own() -> None:
    def halves(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return up * silu(gate)

    for function, given in ((halves, [X]), (lambda a: silu(a) * a, [X])):
        program = program_of(function, given)
        made = passed(program, "silu_mul")
        assert ops_of(made) == ["silu_mul"]
        assert_same_results(program, made.rewritten.program)


def test_two_of_one_input_are_both_found() -> None:
    program = program_of(lambda a, b: silu(a) * b + silu(b) * a, [X, X])
    made = passed(program, "silu_mul")
    assert ops_of(made) == ["silu_mul", "silu_mul"]
    assert [call.args for call in made.rewritten.program.calls[:2]] == [({"i": 0}, {"i": 1}), ({"i": 1}, {"i": 0})]
    assert_same_results(program, made.rewritten.program)


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + _turned(x) * sin


Q, ANGLES = spec(1, 4, ROWS, 16), spec(1, 1, ROWS, 16)


def _backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], -x[..., :half]), dim=-1) * sin


ROTARY: dict[str, tuple[Callable[..., Any], str]] = {
    "one alone": (lambda q, _k, cos, sin: _rotated(q, cos, sin), "there is no second result of the same"),
    "k of q": (
        lambda q, _k, cos, sin: (_rotated(_rotated(q, cos, sin), cos, sin), q),
        "one of its arguments is computed from its result",
    ),
    "in another direction": (lambda q, k, c, s: (_backwards(q, c, s), _backwards(k, c, s)), ""),
    "other thirds": (
        lambda q, k, c, s: tuple(x * c + torch.cat((-x[..., 6:], x[..., :6]), dim=-1) * s for x in (q, k)),
        "has [3, 6, 9223372036854775807], where it has",
    ),
}


@pytest.mark.parametrize("name", ROTARY)
def test_rotations_that_are_none(name: str) -> None:
    function, why = ROTARY[name]
    program = program_of(function, [Q, Q, ANGLES, ANGLES])
    made = passed(program, "rotary")
    assert made.rewritten.program is program
    misses = report(made, "rotary").near_misses
    assert bool(misses) == bool(why)  # too little is there where they turn in another direction
    assert all(why in miss for miss in misses[:1])


def test_results_that_are_read_before_the_other_is_there() -> None:
    """The op comes where both are, and what reads the first comes after it."""

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        first = _rotated(q, cos, sin).exp()
        return first, _rotated(k + 1, cos, sin)

    program = program_of(function, [Q, Q, ANGLES, ANGLES])
    made = passed(program, "rotary")
    assert targets(made.rewritten.program) == [
        "aten.add.Tensor",
        "piecework.rotary.default",
        "operator.getitem",
        "operator.getitem",
        "aten.exp.default",
    ]
    assert_same_results(program, made.rewritten.program)


def test_a_miss_of_one_pass_that_another_fuses_is_none() -> None:
    """RMS norms have most of a layer norm."""
    made = passed(program_of(_rms, [X, W], weights=1))
    assert ops_of(made) == ["rms_norm"]
    assert not [why for found in made.reports for why in found.near_misses]


def test_reports_name_captured_calls() -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return _rms((x * 1.0).unsqueeze(0).squeeze(0), weight)

    made = passed(program_of(function, [HALF, HALF_W], weights=1))
    assert report(made, "rms_norm").matches == (
        "rms_norm(bfloat16[1, s0, 16], bfloat16[16], 1e-06) for calls 3-10, Llama's",
    )
    assert made.rewritten.origins == (tuple(range(3, 11)),)
    found = report(made, "rms_norm").to_json()
    assert (found["name"], found["ops_before"], found["ops_after"]) == ("rms_norm", 8, 1)
