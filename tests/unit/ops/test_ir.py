"""How an op is declared and implemented, what is refused, and that calls go through torch's dispatcher."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import piecework
from piecework.errors import OpError
from piecework.foundation.torch_private import find_overload
from piecework.ops.ir.inputs import Draw
from piecework.ops.ir.op import IrOp, ir_op
from piecework.ops.ir.opaque_op import declared_op
from piecework.ops.ir.operator import operator_name
from piecework.ops.ir.provider_order import ProviderOrder
from piecework.ops.ir.selection import CallFacts, choose_implementation

_NUMBERS = itertools.count()


def _inputs(draw: Draw) -> tuple[Any, ...]:
    return draw.tensor(draw.rows, 8), draw.tensor(draw.rows, 8), 3.0


def _added(x: Tensor, y: Tensor, factor: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return x + factor * y, and y + 1."""
    return x + factor * y, y + 1


@pytest.fixture
def added() -> IrOp:
    """Return an op of its own name for each test: what is registered stays registered."""
    name = f"piecework_test_ir::added_{next(_NUMBERS)}"
    return piecework.op(name, inputs=_inputs, tolerance={torch.float32: 1e-6})(_added)


def _operator(op: IrOp, provider: str = "") -> Any:
    """Return torch's operator of an op, or that of one provider's implementation."""
    return find_overload(operator_name(op.name, provider) if provider else op.name)


def test_a_call_runs_the_native_function(added: IrOp) -> None:
    x, y = torch.ones(2, 8), torch.full((2, 8), 2.0)
    total, more = added(x, y)
    assert torch.equal(total, torch.full((2, 8), 5.0))
    assert torch.equal(more, y + 1)
    assert torch.equal(added(x, y, factor=0.0)[0], x)
    assert torch.equal(_operator(added)(x, y, 1.0)[0], x + y)


def test_a_trace_keeps_the_call_as_one_node(added: IrOp) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x, y: added(x, y)[0] * 2, tracing_mode="fake")(torch.ones(2, 8), torch.ones(2, 8)).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert added.overload in called


def test_inside_torch_compile_the_native_function_is_traced(added: IrOp) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x, y: added(x, y)[0] * 2, backend=backend, fullgraph=True)
    x, y = torch.ones(2, 8), torch.ones(2, 8)
    assert torch.equal(compiled(x, y), (x + 2 * y) * 2)
    (graph,) = graphs
    assert all("piecework_test_ir" not in str(node.target) for node in graph.graph.nodes)


def test_torchs_object_leads_back_to_the_op(added: IrOp) -> None:
    assert ir_op(added.overload) is added
    assert ir_op(added.name) is added
    assert ir_op(torch.ops.aten.add.Tensor) is None
    assert declared_op(added.overload) is None, "it is no opaque op"


def test_the_same_function_may_be_declared_again(added: IrOp) -> None:
    again = piecework.op(added.name, inputs=_inputs, tolerance={torch.float32: 0.5})(_added)
    assert ir_op(added.name) is again
    assert again.tolerance == {torch.float32: 0.5}


def test_another_function_may_not_take_the_name(added: IrOp) -> None:
    def other(x: Tensor, y: Tensor, factor: float = 2.0) -> tuple[Tensor, Tensor]:
        return x.clone(), y.clone()

    with pytest.raises(OpError, match="an operator of that name"):
        piecework.op(added.name, inputs=_inputs, tolerance={})(other)


def test_results_must_be_tensors() -> None:
    def counts(x: Tensor) -> int:
        return x.shape[0]

    with pytest.raises(OpError, match="results of type"):
        piecework.op("piecework_test_ir::counts", inputs=_inputs, tolerance={})(counts)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x, y: (x, y), "it takes"),
        (lambda x, z, factor=2.0: (x, z), "it takes"),
        (lambda x, y, factor=3.0: (x, y), "it takes"),
    ],
)
def test_an_implementation_has_the_ops_signature(added: IrOp, function: Any, found: str) -> None:
    with pytest.raises(OpError, match=found):
        added.implement("wrong")(function)
    assert list(added.implementations) == ["native"]


def test_what_implement_refuses(added: IrOp) -> None:
    def same(x: Tensor, y: Tensor, factor: float = 2.0) -> tuple[Tensor, Tensor]:
        return _added(x, y, factor)

    with pytest.raises(OpError, match="no tensor parameter"):
        added.implement("a", mutates="factor")(same)
    with pytest.raises(OpError, match="too many"):
        added.implement("a", reuses=("x", "y", "x"))(same)
    with pytest.raises(OpError, match="inlined implementation that writes"):
        added.implement("a", reuses="x", inlined=True)(same)
    with pytest.raises(OpError, match="the name 'a b'"):
        added.implement("a b")(same)
    with pytest.raises(OpError, match="`supports`"):
        added.implement("a", supports=lambda x: True)(same)
    with pytest.raises(OpError, match="there already"):
        added.implement("native")(same)


def test_an_implementation_is_an_operator_of_its_own(added: IrOp) -> None:
    calls = []

    @added.implement("twice")
    def twice(x: Tensor, y: Tensor, factor: float = 2.0) -> tuple[Tensor, Tensor]:
        calls.append(factor)
        return _added(x, y, factor)

    assert added.implementation("twice") is not None
    x, y = torch.ones(2, 8), torch.ones(2, 8)
    assert torch.equal(_operator(added, "twice")(x, y, 3.0)[0], x + 3 * y)
    assert calls == [3.0]
    added.check(x, y, provider="twice")


def test_an_implementation_in_place_writes_only_where_it_declares(added: IrOp) -> None:
    @added.implement("in_place", reuses="x")
    def in_place(x: Tensor, y: Tensor, factor: float = 2.0) -> tuple[Tensor, Tensor]:
        return x.add_(y, alpha=factor), y + 1

    @added.implement("lies", reuses="x")
    def lies(x: Tensor, y: Tensor, factor: float = 2.0) -> tuple[Tensor, Tensor]:
        return _added(x, y, factor)

    @added.implement("spills", reuses="x")
    def spills(x: Tensor, y: Tensor, factor: float = 2.0) -> tuple[Tensor, Tensor]:
        x.add_(y, alpha=factor)
        return x, y.add_(1)

    x, y = torch.ones(2, 8), torch.ones(2, 8)
    total, more = added.check(x, y, provider="in_place")
    assert total is x
    assert torch.equal(total, torch.full((2, 8), 3.0))
    assert torch.equal(more, y + 1)
    with pytest.raises(OpError, match="not that argument's tensor"):
        added.check(x, y, provider="lies")
    with pytest.raises(OpError, match="not declared as changed"):
        added.check(x, y, provider="spills")
    with piecework.check_ops(), pytest.raises(OpError, match="not declared as changed"):
        _operator(added, "spills")(x, y, 1.0)


def test_eager_code_never_gets_an_implementation_in_place(added: IrOp) -> None:
    @added.implement("in_place", reuses="x")
    def in_place(x: Tensor, y: Tensor, factor: float = 2.0) -> tuple[Tensor, Tensor]:
        return x.add_(y, alpha=factor), y + 1

    order = ProviderOrder(per_op={added.name: ("in_place", "native")})
    x, y = torch.ones(2, 8), torch.ones(2, 8)
    with piecework.providers(order):
        added(x, y)
    assert torch.equal(x, torch.ones(2, 8))
    choice = choose_implementation(order, added, (x, y))
    assert choice.provider == "native"
    assert "which eager code may still read" in choice.rejected[0].why
    assert choose_implementation(order, added, (x, y), facts=CallFacts(dead=frozenset({"x"}))).provider == "in_place"


def test_a_wrong_result_is_found(added: IrOp) -> None:
    @added.implement("narrow")
    def narrow(x: Tensor, y: Tensor, factor: float = 2.0) -> tuple[Tensor, Tensor]:
        return x.half(), y.clone()

    with pytest.raises(OpError, match="dtype"):
        added.check(torch.ones(2, 8), torch.ones(2, 8), provider="narrow")
    with pytest.raises(OpError, match="check unknown's"):
        added.check(torch.ones(2, 8), torch.ones(2, 8), provider="unknown")
