"""Texts of expressions over sizes are read as torch meant them."""

from __future__ import annotations

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv, Max, Mod

from piecework.foundation.torch_private.expressions import parse_expression

S0, S1 = sympy.Symbol("s0", integer=True, positive=True), sympy.Symbol("s1", integer=True, positive=True)
NAMES = {"s0": S0, "s1": S1}


@pytest.mark.parametrize(
    "expression",
    [
        sympy.Integer(7),
        2 * S0 + 1 - S1,
        FloorDiv(S0 * S1, 2),
        FloorDiv(S0 + 1, S1) * 4,
        Mod(S0, 8),
        Max(S0, S1),
        sympy.Ne(S0, 9),
        sympy.Eq(Mod(S0, 2), 0),
        sympy.Lt(FloorDiv(S0, 2), 5),
        sympy.Ge(S0**2, S1),
        sympy.And(S0 > 2, S1 < 5),
        sympy.Or(S0 > 2, sympy.Ne(S1, 5)),
        sympy.true,
        sympy.false,
    ],
)
def test_what_torch_prints_is_read_back(expression: sympy.Basic) -> None:
    assert parse_expression(str(expression), NAMES) == expression


@pytest.mark.parametrize(
    "text",
    ["", "s0 +", "s2", "open('x')", "s0.real", "[s0]", "__import__('os')", "s0 if s1 else 2", "1.5", "s0 < s1 < 3"],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no expression over sizes"):
        parse_expression(text, NAMES)
