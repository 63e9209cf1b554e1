"""From a program back to a graph that a backend can compile, with sizes symbolic over a range."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from piecework.compiler.rewrite.fakes import declare
from piecework.foundation.torch_private import SymbolicSession
from piecework.ops.ir.decode import decode
from piecework.ops.ir.program import Program, constant_name
from piecework.ops.ir.resolve import resolve_target


def rebuild(
    program: Program, *, ranges: Mapping[str, tuple[int, int]], session: SymbolicSession
) -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    """Return the program as a module whose weights are named parameters, and fake inputs for it.

    Args:
        program: what to build.
        ranges: symbol → (min, max), narrower than declared where an artifact is for a part of the range.
        session: where the symbolic sizes live; a range of one value gives a plain number.
    """
    sizes = declare(program.symbols, session=session, ranges=ranges)
    inputs = [sizes.tensor(spec) for spec in program.inputs]
    root = torch.nn.Module()
    for index, spec in enumerate(program.constants):
        shape, stride = [int(d) for d in spec.shape], [int(d) for d in spec.stride]
        weight = torch.empty_strided(shape, stride, dtype=getattr(torch, spec.dtype), device=spec.device)
        root.register_parameter(constant_name(index), torch.nn.Parameter(weight, requires_grad=False))
    return torch.fx.GraphModule(root, _graph(program)), inputs


def _graph(program: Program) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(len(program.inputs))]
    constants = [graph.get_attr(constant_name(i)) for i in range(len(program.constants))]
    calls: list[torch.fx.Node] = []
    tables = {"n": calls, "i": inputs, "c": constants}
    for call in program.calls:
        args = tuple(decode(a, lambda kind, index: tables[kind][index]) for a in call.args)
        kwargs = {k: decode(v, lambda kind, index: tables[kind][index]) for k, v in call.kwargs.items()}
        calls.append(graph.call_function(resolve_target(call.target), args, kwargs))
    graph.output(tuple(decode(o, lambda kind, index: tables[kind][index]) for o in program.outputs))
    return graph
