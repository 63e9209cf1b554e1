"""What piecework changes in Inductor for sizes that hold for their whole range. Nothing is built."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import sympy
import torch
from tests.choice import slow_but

from piecework.foundation.torch_private import SymbolicSession, compile_aoti, inductor

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch warns of itself

S, T = sympy.Symbol("s", integer=True, nonnegative=True), sympy.Symbol("t", integer=True, nonnegative=True)


@pytest.mark.parametrize(
    ("strides", "order"),
    [
        ([32, 8, 1], [2, 1, 0]),
        ([1, 8, 32], [0, 1, 2]),
        ([32, 8, 8, 1], [3, 2, 1, 0]),
        ([32, 32 * S, 1], [2, 0, 1]),
        ([8 * S * T, 8, 8 * S], [1, 2, 0]),
        ([0, 8 * S, 8], [0, 2, 1]),
        ([S, 1], [1, 0]),
        ([8 * S + 8, 8], [1, 0]),
        ([32 * S, 64], None),  # equal for a size of 2
        ([S, T], None),
    ],
)
def test_the_order_of_strides_for_all_sizes_from_2(strides: list[sympy.Expr], order: list[int] | None) -> None:
    assert inductor.stride_order(strides) == order


def transposed_product(directory: Path, *, low: int) -> list[str]:
    """Lower a transposed batch of products over `low` to 64 rows; return what that narrows."""
    session = SymbolicSession()
    rows = session.size("rows", low=low, high=64, hint=23)
    with session.fake_mode:
        x = torch.empty(rows, 4, 16)
    root = torch.nn.Module()
    root.register_parameter("w", torch.nn.Parameter(torch.empty(4, 16, 32), requires_grad=False))
    graph = torch.fx.Graph()
    given, weight = graph.placeholder("x"), graph.get_attr("w")
    swapped = graph.call_function(torch.ops.aten.transpose.int, (given, 0, 1))
    product = graph.call_function(torch.ops.aten.bmm.default, (swapped, weight))
    graph.output((graph.call_function(torch.ops.aten.transpose.int, (product, 0, 1)),))

    def build(kind: str, command: str, target: Path) -> bool:
        target.write_bytes(b"\x00" * 2048)
        return True

    options = {
        "always_keep_tensor_constants": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.precompile_headers": False,
    }
    module = torch.fx.GraphModule(root, graph)
    compile_aoti(module, [x], output=directory / "piece.so", options=options, build=build)
    return [guard.expr for guard in session.narrowing_guards()]


@pytest.mark.parametrize("low", slow_but([0, 1], 0))
def test_a_transposed_result_holds_for_no_row_and_for_one(tmp_path: Path, low: int) -> None:
    assert transposed_product(tmp_path, low=low) == []


def test_without_that_it_would_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_general_stride_order", contextlib.nullcontext)
    assert transposed_product(tmp_path, low=0) != []


def source_of_a_scale(directory: Path) -> str:
    """Return the code generated for a product with exp(7), where 7 is the value that a weight happens to have."""
    root = torch.nn.Module()
    root.register_parameter("w", torch.nn.Parameter(torch.tensor(7.0), requires_grad=False))
    graph = torch.fx.Graph()
    given, weight = graph.placeholder("x"), graph.get_attr("w")
    scale = graph.call_function(torch.ops.aten.exp.default, (weight,))
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (given, scale)),))
    with SymbolicSession().fake_mode:
        x = torch.empty(4)
    sources: list[str] = []

    def build(kind: str, command: str, target: Path) -> bool:
        sources.extend(Path(word).read_text() for word in command.split() if word.endswith(".cpp"))
        target.write_bytes(b"\x00" * 2048)
        return True

    options = {
        "always_keep_tensor_constants": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.precompile_headers": False,
    }
    compile_aoti(torch.fx.GraphModule(root, graph), [x], output=directory / "w.so", options=options, build=build)
    return "\n".join(sources)


def test_what_is_computed_of_a_weight_of_one_element_is_not_known(tmp_path: Path) -> None:
    assert "exp" in source_of_a_scale(tmp_path)
    assert "1096.6" not in source_of_a_scale(tmp_path)


def test_without_that_it_would_be_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_weights_without_values", contextlib.nullcontext)
    assert "1096.6" in source_of_a_scale(tmp_path)
