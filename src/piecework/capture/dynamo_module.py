"""Make a compiler's input of a described piece: a graph of aten operators, and fake inputs for it.

It is traced once more here, to aten operators, because torch keeps no artifact of a graph that calls torch functions
whose text it doesn't know (`rms_norm` is one).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from piecework.capture.dynamo_split import example
from piecework.capture.dynamo_text import SYMBOL, DescribedPiece
from piecework.foundation.torch_private import SymbolicSession, is_traced_object, real_object, stand_in, trace
from piecework.ops.ir.lifted import Lifted, lifted_operator


@dataclass(frozen=True)
class PieceModule:
    """What a compiler compiles.

    Attributes:
        module: takes the piece's inputs, then the lifted values; returns a tuple.
        inputs: a fake value for each.
        session: the sizes of those; guards that a compile adds are found there.
    """

    module: torch.fx.GraphModule
    inputs: tuple[Any, ...]
    session: SymbolicSession


@dataclass(frozen=True)
class SizeRange:
    """What is known of a symbol: its bounds (sys.maxsize and its negative for none), and its value in the example."""

    low: int
    high: int
    hint: int


def piece_module(described: DescribedPiece, *, ranges: Mapping[str, SizeRange]) -> PieceModule:
    """Return the piece as a module; `ranges` are those of the text's symbols."""
    session = SymbolicSession()
    for name, known in ranges.items():
        low = None if known.low <= -sys.maxsize else known.low
        high = None if known.high >= sys.maxsize else known.high
        session.size(name, low=low, high=high, hint=known.hint)
    maker = _Inputs(session, described.symbols, {n: r.hint for n, r in ranges.items()})
    inputs = [maker.make(example(node)) for node in described.piece.inputs]
    inputs += [stand_in(session.fake_mode, Lifted(value)) for value in described.values]
    with torch.no_grad(), session.fake_mode:
        module = trace(plain_module(described), inputs)
    for node in module.graph.nodes:
        node.meta["example_value"] = node.meta.get("val")
    return PieceModule(module, tuple(inputs), session)


def plain_module(described: DescribedPiece) -> torch.fx.GraphModule:
    """Return the piece as a module: inputs, then lifted values; a tuple comes out."""
    piece = described.piece
    root = piece.nodes[0].graph.owning_module
    graph = torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {n: graph.placeholder(f"a{i}") for i, n in enumerate(piece.inputs)}
    carriers = iter([graph.placeholder(f"lifted{i}") for i in range(len(described.values))])
    calls = {c.node: c for c in described.lifted}
    for node in piece.nodes:
        call = calls.get(node)
        if call is None:
            env[node] = graph.node_copy(node, lambda n: env[n])
        else:
            args = [
                next(carriers) if i in call.positions else torch.fx.map_arg(a, lambda n: env[n])
                for i, a in enumerate(call.arguments)
            ]
            env[node] = graph.call_function(lifted_operator(call.overload, call.positions), tuple(args))
        env[node].meta = {}
    graph.output(tuple(env[n] for n in piece.outputs))
    return torch.fx.GraphModule(root if root is not None else torch.nn.Module(), graph)


class _Inputs:
    """Makes fake inputs in a session of its own, like those that Dynamo noted."""

    def __init__(self, session: SymbolicSession, symbols: Mapping[str, str], hints: Mapping[str, int]) -> None:
        self._session = session
        self._symbols = symbols
        self._hints = hints

    def make(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if is_traced_object(value):
            return stand_in(self._session.fake_mode, real_object(value))
        return value

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        # inputs that share memory are given apart here: pieces that would tell the difference aren't compiled
        shape, stride = self._sizes(value.shape), self._sizes(value.stride())
        with self._session.fake_mode:
            return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)

    def _sizes(self, values: Sequence[int | torch.SymInt]) -> list[int | torch.SymInt]:
        return [self._size(v) for v in values]

    def _size(self, value: int | torch.SymInt) -> int | torch.SymInt:
        if isinstance(value, int):
            return value
        text = SYMBOL.sub(lambda m: self._symbols[m.group(0)], str(value.node.expr))
        return self._session.expression(text, hints=self._hints)
