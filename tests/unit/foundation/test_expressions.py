"""Texts of expressions over sizes are read as torch meant them."""

from __future__ import annotations

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv, Max, Mod

from piecework.bundle.sizes import size_expression
from piecework.foundation.torch_private.expressions import expression_text, parse_expression

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


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (sympy.Integer(7), "7"),
        (2 * S0 + 1 - S1, "2*rows + -1*s1 + 1"),
        (S0**2 * S1, "rows*rows*s1"),
        (4 * (S0 + S1), "4*rows + 4*s1"),
        (FloorDiv(S0 + 1, S1) * 4, "4*((rows + 1)//s1)"),
        (S0 * (S0 + 1) / 2, "((rows*rows + rows)//2)"),
    ],
)
def test_texts_that_a_plan_can_read(expression: sympy.Expr, text: str) -> None:
    names = {"s0": "rows", "s1": "s1"}
    assert expression_text(expression, names) == text
    for rows, other in ((4, 3), (10, 1), (7, 2)):
        expected = int(expression.subs({S0: rows, S1: other}))
        assert size_expression(text)({"rows": rows, "s1": other}) == expected


@pytest.mark.parametrize("expression", [Mod(S0, 8), Max(S0, S1), sympy.sqrt(S0), sympy.Symbol("other")])
def test_texts_of_anything_else(expression: sympy.Expr) -> None:
    with pytest.raises(ValueError, match="no expression over sizes"):
        expression_text(expression, {"s0": "s0", "s1": "s1"})
