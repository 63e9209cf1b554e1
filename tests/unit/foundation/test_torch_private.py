"""What piecework relies on in torch's private API; a failure says which entry of torch_private torch has changed."""

from __future__ import annotations

import contextlib

import pytest
import torch

from piecework.foundation.torch_private import (
    Operator,
    SymbolicSession,
    kernels_for_symbols,
    last_node,
    nodes_after,
    operator_name,
    operator_of,
    parameter_position,
)


def test_an_operator_is_known_by_name_overload_and_whether_it_changes_an_argument() -> None:
    assert operator_of(torch.ops.aten.add.Tensor) == Operator("aten::add", "Tensor", mutates=False)
    assert operator_of(torch.ops.aten.relu.default) == Operator("aten::relu", "default", mutates=False)
    assert operator_of(torch.ops.aten.add_.Tensor) == Operator("aten::add_", "Tensor", mutates=True)


@pytest.mark.parametrize("target", [torch.add, torch.ops.aten.add, "add", None])
def test_what_is_no_single_operator_gives_none(target: object) -> None:
    assert operator_of(target) is None


def test_names_of_operators_and_of_all_their_overloads() -> None:
    assert operator_name(torch.ops.aten.add) == "aten::add"
    assert operator_name(torch.ops.aten.add.Tensor) == "aten::add"
    assert operator_name(torch.add) is None


def test_nodes_that_were_added_since() -> None:
    graph = torch.fx.Graph()
    start = last_node(graph)
    x = graph.placeholder("x")
    assert list(nodes_after(graph, start)) == [x]
    assert last_node(graph) is x
    y = graph.call_function(torch.neg, (x,))
    assert list(nodes_after(graph, x)) == [y]
    assert list(nodes_after(graph, y)) == []


def test_positions_of_parameters() -> None:
    assert [parameter_position(torch.ops.aten.add.Tensor, name) for name in ("self", "other", "alpha")] == [0, 1, 2]
    with pytest.raises(ValueError, match="beta"):
        parameter_position(torch.ops.aten.add.Tensor, "beta")


def test_kernels_in_python_keep_sizes_symbolic() -> None:
    """Without them `torch.complex` makes a number of a symbolic size; where it doesn't, they are needed no more."""
    for kernels, guards in ((contextlib.nullcontext(), {"Eq(n, 32)"}), (kernels_for_symbols(), set[str]())):
        session = SymbolicSession()
        size = session.size("n", low=2, high=64, hint=32)
        with session.fake_mode, kernels:
            x = torch.empty(size, 8)
            torch.complex(x, x)
        assert {guard.expr for guard in session.narrowing_guards()} == guards
