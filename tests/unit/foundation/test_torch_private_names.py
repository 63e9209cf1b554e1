"""What captures of layers' names rely on in torch's private API; a failure says which entry torch has changed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tests.unit.capture.name_ops import by_layer
from torch import Tensor

from piecework.foundation.torch_private import (
    TORCHS_NAMESPACES,
    SymbolicSession,
    arguments_of_call,
    call_arguments,
    current_tracer,
    trace,
)
from piecework.ops.ir.layer import IS_OBJECT, LayerName


def test_torchs_own_operators_are_in_torchs_namespaces() -> None:
    program = (
        "import torch, torch._inductor.compile_fx, torch.distributed\n"
        "print(*sorted({n.split('::')[0] for n in torch._C._dispatch_get_all_op_names()}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= TORCHS_NAMESPACES
    assert "piecework" not in TORCHS_NAMESPACES


@pytest.mark.parametrize(
    ("args", "kwargs", "written"),
    [
        (("x", ["n"]), {}, (("x", ["n"]), {})),
        (("x",), {"layers": ["n"]}, (("x", ["n"]), {})),
        (("x", ["n"]), {"number": 7}, (("x", ["n"]), {})),
        (("x", ["n"]), {"number": 8}, (("x", ["n"]), {"number": 8})),
    ],
)
def test_arguments_are_written_as_a_trace_writes_them(args: tuple, kwargs: dict, written: tuple) -> None:
    target = torch.ops.pwgraph.listed.default
    named = call_arguments(target, args, kwargs)
    assert list(named) == ["x", "layers", "number"]
    assert arguments_of_call(target, named) == written


def test_only_defaults_at_the_end_are_left_out() -> None:
    target = torch.ops.aten.add.Tensor
    assert arguments_of_call(target, {"self": 1, "other": 2, "alpha": 1}) == ((1, 2), {})
    target = torch.ops.aten.sum.dim_IntList
    named = call_arguments(target, ("x", [1]), {"keepdim": False, "dtype": None})
    assert arguments_of_call(target, named) == (("x", [1]), {})


def traced(function: object, *, keep: bool) -> torch.fx.GraphModule:
    session = SymbolicSession()
    rows = session.size("rows", low=1, high=64, hint=37)
    with session.fake_mode:
        x = torch.empty([rows, 8])

    def run(x: Tensor) -> Tensor:
        tracer = current_tracer()
        assert tracer is not None
        if keep:
            tracer.keep(LayerName)
        return function(x)  # type: ignore[operator]

    with torch.no_grad(), session.fake_mode:
        return trace(run, [x])


@pytest.mark.skipif(not IS_OBJECT, reason="a LayerName is a string here")
def test_objects_that_are_kept_are_arguments_of_nodes() -> None:
    name = LayerName("a")
    made = traced(lambda x: by_layer(x, name), keep=True)
    (node,) = [n for n in made.graph.nodes if n.op == "call_function"]
    assert node.args[1] is name
    (other,) = [n for n in traced(lambda x: by_layer(x, name), keep=False).graph.nodes if n.op == "call_function"]
    assert isinstance(other.args[1], torch.fx.Node)


def test_traces_are_lean() -> None:
    made = traced(lambda x: x + 1, keep=False)
    node = next(n for n in made.graph.nodes if n.op == "call_function")
    assert node.meta["val"].shape[1] == 8
    assert node.meta.get("tensor_meta") is None
    assert "_LazyGraphModule" in [c.__name__ for c in type(made).__mro__]
