"""Trace a function on the arguments of one call into operators of torch's own, as a program's calls.

Arguments that differ from run to run are tensors and sizes; all others are written into the body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from piecework.compiler.encode import encode_torch_type, target_name
from piecework.compiler.rewrite.fakes import Symbols, declare, made_of
from piecework.errors import InternalError
from piecework.foundation.torch_private import (
    SymbolicSession,
    data_dependent_errors,
    functionalized,
    size_oblivious,
    trace,
)
from piecework.ops.ir.program import Call, TensorSpec, encode_float


@dataclass(frozen=True)
class Body:
    """A function as calls. {"i": k} is the k-th of its arguments that are tensors or sizes, {"n": j} the j-th call.

    Attributes:
        calls: the operators.
        results: references, one per result.
        specs: what the results are.
    """

    calls: tuple[Call, ...]
    results: tuple[Any, ...]
    specs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class NotTraceable:
    """Why a function can't be traced for all of its sizes."""

    why: str


def trace_body(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, symbols: Symbols
) -> Body | NotTraceable:
    """Trace `function(*args, **kwargs)`; arguments are as `FakeRun.described` gives them, over the sizes `symbols`."""
    session = SymbolicSession()
    sizes = declare(symbols, session=session)
    values = [*(made_of(a, sizes) for a in args), *(made_of(v, sizes) for v in kwargs.values())]
    places = [i for i, value in enumerate((*args, *kwargs.values())) if varies(value)]

    def call(*tensors: torch.Tensor) -> tuple[Any, ...]:
        given = list(values)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        result = function(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))
        return tuple(result) if isinstance(result, (list, tuple)) else (result,)

    try:
        with torch.no_grad(), size_oblivious():
            graph = trace(functionalized(call), [values[place] for place in places]).graph
    except data_dependent_errors():
        return NotTraceable("it looks at the values of its arguments")
    guards = session.narrowing_guards()
    if guards:
        return NotTraceable("it holds only where " + " and ".join(sorted({g.expr for g in guards})[:3]))
    graph.eliminate_dead_code()
    return _written(graph, spec=sizes.spec)


def varies(described: Any) -> bool:
    """Whether an argument, as `FakeRun.described` gives it, is a tensor or a size, which a body has as an input."""
    return isinstance(described, Mapping) and ("tensor" in described or "size" in described)


def _written(graph: torch.fx.Graph, *, spec: Callable[[torch.Tensor], TensorSpec]) -> Body:
    references: dict[torch.fx.Node, dict[str, int]] = {}
    calls: list[Call] = []
    results: Sequence[torch.fx.Node] = ()
    num_inputs = 0

    def encoded(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return references[value]
        if isinstance(value, (list, tuple)):
            return [encoded(item) for item in value]
        if isinstance(value, float):
            return encode_float(value)
        return encode_torch_type(value) or value

    for node in graph.nodes:
        if node.op == "placeholder":
            references[node] = {"i": num_inputs}
            num_inputs += 1
        elif node.op == "call_function":
            kwargs = {name: encoded(value) for name, value in node.kwargs.items()}
            calls.append(Call(target_name(node.target), tuple(encoded(a) for a in node.args), kwargs))
            references[node] = {"n": len(calls) - 1}
        elif node.op == "output":
            results = node.args[0]
        else:
            raise InternalError(f"an op's function has a tensor of its own: {node.target}")
    specs = tuple(spec(node.meta["val"]) for node in results)
    return Body(tuple(calls), tuple(references[node] for node in results), specs)
