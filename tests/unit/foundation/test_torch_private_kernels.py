"""Which kernels Inductor says that it generates, and what each moves. Nothing is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from piecework.foundation.torch_private import SymbolicSession, compile_aoti, scheduled_kernels
from piecework.foundation.traffic import Kernel, kernels_from_json, kernels_to_json

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch warns of itself

aten = torch.ops.aten
_OPTIONS = {
    "always_keep_tensor_constants": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.precompile_headers": False,
}


class Graph:
    """A graph over `x`, float32 [rows, 16], with weights `w` [16, 32] and `table` [100, 16]."""

    def __init__(self, *, dtype: torch.dtype = torch.float32) -> None:
        self.session = SymbolicSession()
        self.rows = self.session.size("rows", low=1, high=64, hint=23)
        with self.session.fake_mode:
            self.given = torch.empty(self.rows, 16, dtype=dtype)
        self.root = torch.nn.Module()
        self.graph = torch.fx.Graph()
        self.x = self.graph.placeholder("x")

    def weight(self, name: str, *shape: int) -> torch.fx.Node:
        self.root.register_parameter(name, torch.nn.Parameter(torch.empty(shape), requires_grad=False))
        return self.graph.get_attr(name)

    def call(self, target: Any, *args: Any) -> torch.fx.Node:
        return self.graph.call_function(target, args)

    def lowered(self, directory: Path, *outputs: torch.fx.Node) -> list[Kernel]:
        """Lower the graph and return what was told last, and nothing if nothing was."""
        self.graph.output(outputs)
        told: list[Sequence[Kernel]] = [[]]

        def build(kind: str, command: str, target: Path) -> bool:
            target.write_bytes(b"\x00" * 2048)
            return True

        compile_aoti(
            torch.fx.GraphModule(self.root, self.graph),
            [self.given],
            output=directory / "piece.so",
            options=_OPTIONS,
            build=build,
            on_kernels=told.append,
            size_names=self.session.symbol_names,
        )
        return list(told[-1])


def test_neighbours_are_one_kernel_and_what_lies_between_costs_nothing(tmp_path: Path) -> None:
    graph = Graph()
    silu = graph.call(aten.silu.default, graph.x)
    total = graph.call(aten.mul.Tensor, silu, graph.weight("scale", 16))
    (kernel,) = graph.lowered(tmp_path, total)
    assert "aten.mul.Tensor" in kernel.name
    assert (kernel.weights, kernel.reads, kernel.writes) == ((("64",),), (("64*rows",),), (("64*rows",),))


def test_a_product_is_a_call_that_reads_all_of_its_arguments(tmp_path: Path) -> None:
    graph = Graph()
    product = graph.call(aten.mm.default, graph.x, graph.weight("w", 16, 32))
    relu = graph.call(aten.relu.default, product)
    first, second = graph.lowered(tmp_path, relu)
    assert (first.weights, first.reads, first.writes) == (((str(16 * 32 * 4),),), (("64*rows",),), (("128*rows",),))
    assert second.name == "loops: aten.relu.default"
    assert (second.weights, second.reads, second.writes) == ((), (("128*rows",),), (("128*rows",),))


def test_a_lookup_reads_no_more_than_the_table_and_no_more_than_it_returns(tmp_path: Path) -> None:
    graph = Graph(dtype=torch.int64)
    (kernel,) = graph.lowered(tmp_path, graph.call(aten.embedding.default, graph.weight("table", 100, 8), graph.x))
    assert kernel.weights == (("512*rows", "3200"),)
    assert (kernel.reads, kernel.writes) == ((("128*rows",),), (("512*rows",),))


def test_parts_of_a_tensor_count_once_each(tmp_path: Path) -> None:
    graph = Graph()
    parts = [graph.call(aten.slice.Tensor, graph.x, 1, low, low + 4) for low in (0, 0, 8)]
    total = graph.call(aten.mul.Tensor, graph.call(aten.mul.Tensor, parts[0], parts[1]), parts[2])
    (kernel,) = graph.lowered(tmp_path, total)
    assert kernel.reads == (("32*rows", "64*rows"),)
    assert kernel.writes == (("16*rows",),)


@pytest.mark.parametrize(
    ("other", "read"),
    [
        ((aten.flip.default, [1]), "64*rows"),
        ((aten.flip.default, [2]), "64*rows"),
        ((aten.flip.default, [1, 2]), "64*rows"),
        ((aten.slice.Tensor, 1, 1, 2), "64*rows"),
        ((aten.slice.Tensor, 2, 3, 4), "64*rows"),
        ((aten.mul.Scalar, 2), "64*rows"),
    ],
)
def test_what_lies_within_another_part_counts_nothing(tmp_path: Path, other: tuple[Any, ...], read: str) -> None:
    graph = Graph()
    stored = graph.call(aten.mm.default, graph.x, graph.weight("w", 16, 64))  # [rows, 64], of which 16 columns are read
    columns = graph.call(aten.slice.Tensor, stored, 1, 16, 32)
    halves = graph.call(aten.view.default, columns, [-1, 2, 8])
    operator, *arguments = other
    total = graph.call(aten.add.Tensor, halves, graph.call(operator, halves, *arguments))
    _, kernel = graph.lowered(tmp_path, total)
    assert kernel.reads == ((read, "256*rows"),)


def test_parts_that_overlap_count_both(tmp_path: Path) -> None:
    graph = Graph()
    parts = [graph.call(aten.slice.Tensor, graph.x, 1, low, low + 4) for low in (0, 2)]
    (kernel,) = graph.lowered(tmp_path, graph.call(aten.add.Tensor, *parts))
    assert kernel.reads == (("32*rows", "64*rows"),)


def test_several_results_of_a_call_and_views_of_them(tmp_path: Path) -> None:
    graph = Graph()
    made = graph.call(aten.topk.default, graph.x, 4)
    values, indices = (graph.call(torch.ops.aten.view.default, graph.call(_getitem, made, n), [-1]) for n in (0, 1))
    (kernel,) = graph.lowered(tmp_path, values, indices)
    assert kernel.name == "aten.topk.default"
    assert (kernel.reads, kernel.writes) == ((("64*rows",),), (("16*rows",), ("32*rows",)))


def _getitem(value: Any, index: int) -> Any:
    return value[index]


def test_what_cannot_be_counted_is_compiled_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduled_kernels, "_product", None)
    graph = Graph()
    product = graph.call(aten.mm.default, graph.x, graph.weight("w", 16, 32))
    assert graph.lowered(tmp_path, product) == []
    assert (tmp_path / "piece.so").exists()


def test_kernels_are_json() -> None:
    some = (Kernel("a", (("1", "rows"),), ((),), ()), Kernel("b"))
    assert kernels_from_json(kernels_to_json(some)) == some
    for wrong in ([["a"]], [1], 3, [["a", 1, [], []]]):
        with pytest.raises((TypeError, ValueError)):
            kernels_from_json(wrong)
