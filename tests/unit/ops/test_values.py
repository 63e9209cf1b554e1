"""Functions of values as operators call them."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from piecework import opaque_op
from piecework.ops.ir.values import flattened


class Rows(NamedTuple):
    first: Tensor
    count: int
    step: int = 1


class Scale(NamedTuple):
    factor: float = 2.0
    shift: float | None = None


@flattened
def scaled(x: Tensor, rows: Rows, scale: Scale = Scale(factor=3.0), extra: int = 0) -> Tensor:  # noqa: B008
    """Scale some rows."""
    assert isinstance(rows, Rows)
    assert isinstance(scale, Scale)
    return x[:: rows.step][: rows.count] * scale.factor + (scale.shift or 0) + rows.first + extra


X = torch.arange(6.0)


def test_fields_are_parameters_with_their_defaults() -> None:
    parameters = inspect.signature(scaled).parameters
    assert list(parameters) == ["x", "first", "count", "step", "factor", "shift", "extra"]
    assert [p.default for p in parameters.values()][2:] == [inspect.Parameter.empty, 1, 3.0, None, 0]
    assert parameters["shift"].annotation == float | None
    assert scaled.__doc__ == "Scale some rows."


def test_is_called_by_position_or_by_name() -> None:
    zero = torch.zeros(1)
    assert scaled(X, zero, 2).tolist() == [0, 3]
    assert scaled(X, zero, 2, 2, 1.0, 5.0, 1).tolist() == [6, 8]
    assert scaled(X, zero, extra=1, count=2, factor=1.0).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("args", "named"), [((X,), {}), ((X, X, 1), {"width": 3}), ((X, X, 1, 1, 1.0, None, 0, 9), {})]
)
def test_wrong_calls_are_type_errors(args: tuple[object, ...], named: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="scaled"):
        scaled(*args, **named)


def test_an_operators_schema_has_the_fields() -> None:
    op = opaque_op("piecework_tests::scaled_rows")(scaled)
    assert str(op.overload._schema) == (
        "piecework_tests::scaled_rows(Tensor x, Tensor first, SymInt count, SymInt step=1, float factor=3., "
        "float? shift=None, SymInt extra=0) -> Tensor"
    )
    assert op(X, torch.zeros(1), 2).tolist() == [0, 3]
    assert opaque_op("piecework_tests::scaled_rows")(scaled) is op
