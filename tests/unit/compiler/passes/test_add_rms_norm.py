"""Sums that are normed and read elsewhere, in place where a provider can."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from piecework.compiler.passes.lower import Lowering
from piecework.ops.ir.program import Program
from piecework.ops.ir.provider_order import ProviderOrder
from piecework.ops.norms import add_rms_norm, rms_norm
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
W = spec(16)
_NUMBERS = itertools.count()


def _layer(residual: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x.exp()
    return rms_norm(total, weight, 1e-5), total


def test_the_sum_and_its_norm_become_one() -> None:
    program = program_of(_layer, [X, X, W], weights=1)
    made = passed(program, "add_rms_norm")
    (call,) = (c for c in made.rewritten.program.calls if "add_rms_norm" in c.target)
    assert call.args == ({"n": 0}, {"i": 0}, {"c": 0}, 1e-5), "what was computed last comes first"
    assert made.rewritten.origins == ((0,), (1, 2), (1, 2), (1, 2))
    assert report(made, "add_rms_norm").matches == (
        "add_rms_norm: calls 1-2, a sum that is read by the piece's caller too",
    )
    assert_same_results(program, made.rewritten.program)


def test_a_spelled_norm_and_a_sum_that_is_read_later() -> None:
    def layers(residual: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        wide = total.float()
        normed = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return normed.exp(), total + normed.exp()

    program = program_of(layers, [spec(ROWS, 16, dtype="bfloat16")] * 2 + [spec(16, dtype="bfloat16")], weights=1)
    made = passed(program)
    assert ops_of(made) == ["add_rms_norm"]
    assert_same_results(program, made.rewritten.program)


REFUSED: dict[str, tuple[Callable[..., Any], list[Any], str]] = {
    "nothing else": (lambda r, x, w: rms_norm(r + x, w), [X, X, W], "nothing else reads the sum"),
    "scaled": (
        lambda r, x, w: (rms_norm(torch.add(r, x, alpha=2), w), torch.add(r, x, alpha=2)),
        [X, X, W],
        "no sum of two tensors",
    ),
    "a number": (lambda r, _x, w: _both(r + 1, w), [X, X, W], "no sum of two tensors"),
    "broadcast": (lambda r, x, w: _both(r + x, w), [X, spec(16), W], "different shapes"),
    "other dtypes": (lambda r, x, w: _both(r + x, w), [X, spec(1, ROWS, 16, dtype="bfloat16"), W], "dtypes"),
    "other strides": (
        lambda r, x, w: _both(r + x.transpose(0, 1), w),
        [spec(4, 4, 16), spec(4, 4, 16), W],
        "different shapes, strides or dtypes",
    ),
}


def _both(total: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm(total, weight), total


@pytest.mark.parametrize("name", REFUSED)
def test_sums_that_stay_apart(name: str) -> None:
    function, inputs, why = REFUSED[name]
    made = passed(program_of(function, inputs, weights=1), "add_rms_norm")
    assert "add_rms_norm" not in ops_of(made)
    misses = report(made, "add_rms_norm").near_misses
    assert any(why in miss for miss in misses)


def test_a_sum_with_two_norms() -> None:
    def function(residual: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        total = residual + x
        return rms_norm(total, weight), rms_norm(total, weight, 1e-3), total

    program = program_of(function, [X, X, W], weights=1)
    made = passed(program, "add_rms_norm")
    assert ops_of(made) == ["add_rms_norm", "rms_norm"]
    assert "has a norm already" in report(made, "add_rms_norm").near_misses[0]
    assert_same_results(program, made.rewritten.program)


def test_a_provider_in_place_gets_it_where_both_are_dead() -> None:
    provider = f"test_in_place_{next(_NUMBERS)}"

    @add_rms_norm.implement(provider, reuses=("x", "residual"))
    def in_place(
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None = None,
        eps: float = 1e-6,
        offset: float = 0.0,
        round_first: bool = True,
    ) -> tuple[Tensor, Tensor]:
        normed, total = add_rms_norm.native(x, residual, weight, eps, offset, round_first)
        return x.copy_(normed), residual.copy_(total)

    def dead(residual: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual.exp() + x.exp()
        return rms_norm(total, weight), total

    lowering = Lowering(ProviderOrder(per_op={"add_rms_norm": (provider, "native")}))
    found = {}
    for name, function in (("dead", dead), ("an input", _layer)):
        program = program_of(function, [X, X, W], weights=1)
        made = passed(program, "add_rms_norm").rewritten
        lowered = lowering.lower(made.program, origins=made.origins)
        (site,) = lowered.sites
        found[name] = site.provider
        assert site.origins == ((2, 3) if name == "dead" else (1, 2))
        assert_same_results(program, lowered.program)
        assert _in_place(lowered.program) == (name == "dead")
    assert found == {"dead": provider, "an input": "native"}


def _in_place(program: Program) -> bool:
    return any("test_in_place" in target for target in targets(program))
