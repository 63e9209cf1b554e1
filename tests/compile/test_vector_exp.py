"""The exponential function that pieces without weights have in line: as exact as a library's, at the ends as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import piecework
from piecework.compiler.backends.vector_exp import exp_source
from piecework.ops.ir.inputs import Draw
from piecework.ops.ir.program import Call, Program, TensorSpec


@piecework.op("piecework_test_exp::exponential", inputs=lambda draw: _inputs(draw), tolerance={torch.float32: 1e-6})
def exponential(x: torch.Tensor) -> torch.Tensor:
    return x.exp()


def _inputs(draw: Draw) -> tuple[torch.Tensor]:
    return (draw.tensor(draw.rows, draw.width()),)


@pytest.mark.slow
def test_it_is_within_two_units_in_the_last_place(home: Path) -> None:
    x = torch.linspace(-87.0, 88.7, 1 << 16).view(-1, 64)
    inf, nan = float("inf"), float("nan")
    ends = [0.0, -0.0, inf, -inf, nan, 200.0, -200.0, 3e38, -3e38, 88.8, -104.5, 1e-40, 1.0, -1.0, 1e-8, -1e-8]
    with piecework.eager_ops(store=home) as ops:
        found, odd = exponential(x), exponential(torch.tensor(ends * 4).view(1, 64))
        tail = exponential(torch.linspace(-3, 3, 64 * 3 * 7).view(21, 64)[:, :])
    assert len(ops.compiled) == 1
    exact = x.double().exp()
    assert ((found.double() - exact).abs() / exact).max() < 2 * torch.finfo(torch.float32).eps
    expected = torch.tensor(ends * 4).view(1, 64).exp()
    torch.testing.assert_close(odd, expected, rtol=3e-7, atol=1e-44, equal_nan=True)
    assert tail.isfinite().all()


@pytest.mark.parametrize(("target", "constants", "has"), [("silu", 0, True), ("silu", 1, False), ("neg", 0, False)])
def test_only_pieces_without_weights_that_need_it_have_it(target: str, constants: int, has: bool) -> None:
    spec = TensorSpec((4,), (1,), "float32", "cpu")
    program = Program((), (spec,), (spec,) * constants, (Call(f"aten.{target}.default", ({"i": 0},), {}),), ({"n": 0},))
    assert bool(exp_source(program)) is has
