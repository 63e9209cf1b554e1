"""Turn one graph of Dynamo's into a list of calls: compiled pieces, and opaque operators between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from piecework.bundle.record import Recorder
from piecework.bundle.run.call_list import CallList, FunctionCall, PieceCall, Slot
from piecework.capture.dynamo_split import GraphCall, GraphPiece, example, output_nodes, split_graph
from piecework.capture.dynamo_text import DescribedPiece, describe
from piecework.compiler.jit_options import JitOptions
from piecework.compiler.jit_pieces import PieceSource, Run
from piecework.foundation.digests import digest_json
from piecework.foundation.torch_private import operator_arguments, operator_name
from piecework.ops.ir.lifted import Lifted
from piecework.ops.ir.opaque_op import OpaqueOp, declared_op


@dataclass(frozen=True)
class CompiledGraph:
    """A graph as a function of its inputs.

    `shape` digests what a compiler sees of it: graphs that differ in lifted values only have it in common. None where
    some piece can't be written down. `needs_grad` says which results eager mode would record for a backward pass.
    """

    calls: CallList
    shape: str | None
    num_lifted: int
    needs_grad: tuple[bool, ...]


def compile_graph(
    module: torch.fx.GraphModule, *, options: JitOptions, recorder: Recorder, source: PieceSource
) -> CompiledGraph:
    """Cut a graph, have its pieces compiled, and put them together again.

    Args:
        module: from Dynamo; it is changed.
        options: of the backend.
        recorder: is told seconds and counts.
        source: gives the pieces.

    Raises CompileError, StoreError.
    """
    return _GraphCompile(module, options=options, recorder=recorder, source=source).compile()


class _GraphCompile:
    """Compiles one graph."""

    def __init__(
        self, module: torch.fx.GraphModule, *, options: JitOptions, recorder: Recorder, source: PieceSource
    ) -> None:
        self._module = module
        self._options = options
        self._recorder = recorder
        self._source = source
        self._numbers: dict[torch.fx.Node, int] = {}
        self._constants: list[Any] = []

    def compile(self) -> CompiledGraph:
        graph = self._module.graph
        with self._recorder.phase("split"):
            steps = split_graph(graph, is_cut=self._is_cut)
            described = {
                i: describe(s, lift=self._options.lift_names) for i, s in enumerate(steps) if isinstance(s, GraphPiece)
            }
        self._number(graph, steps, described)
        with self._recorder.phase("compile"):
            runs = {i: self._source.run(d) for i, d in described.items()}
        calls = [
            self._piece_call(s, runs[i]) if isinstance(s, GraphPiece) else self._function_call(s)
            for i, s in enumerate(steps)
        ]
        num_lifted = sum(len(d.values) for d in described.values())
        self._recorder.count("graphs")
        self._recorder.count("names_lifted", by=num_lifted)
        call_list = CallList(
            num_inputs=sum(n.op == "placeholder" for n in graph.nodes),
            constants=self._constants,
            num_values=self._num_values,
            calls=calls,
            results=[self._argument(o) for o in output_nodes(graph)],
        )
        grads = [_requires_grad(o) for o in output_nodes(graph)]
        return CompiledGraph(call_list, _shape(steps, described), num_lifted, tuple(grads))

    def _is_cut(self, node: torch.fx.Node) -> bool:
        name = operator_name(node.target)
        if name is None:
            return False
        declared = declared_op(name)
        return name in self._options.cut or (declared is not None and declared.cuts)

    def _number(
        self,
        graph: torch.fx.Graph,
        steps: Sequence[GraphPiece | GraphCall],
        described: Mapping[int, DescribedPiece],
    ) -> None:
        """Give every value a number: inputs, then tensors that the graph holds and lifted values, then results."""
        for node in graph.nodes:
            if node.op == "placeholder":
                self._numbers[node] = len(self._numbers)
        count = len(self._numbers)
        for node in graph.nodes:
            if node.op == "get_attr" and isinstance(value := _attribute(self._module, node), torch.Tensor):
                self._numbers[node] = count + len(self._constants)
                self._constants.append(value)
        self._lifted: dict[int, list[int]] = {}
        known: dict[tuple[type, Any], int] = {}
        for i, d in described.items():
            self._lifted[i] = []
            for value in d.values:
                if (type(value), value) not in known:
                    known[type(value), value] = count + len(self._constants)
                    self._constants.append(Lifted(value))
                self._lifted[i].append(known[type(value), value])
        following = count + len(self._constants)
        for step in steps:
            made = step.outputs if isinstance(step, GraphPiece) else (step.node, *(n for _, n in step.items))
            for node in made:
                self._numbers[node] = following
                following += 1
        self._num_values = following
        self._lifted_by_piece = {id(steps[i]): numbers for i, numbers in self._lifted.items()}

    def _piece_call(self, piece: GraphPiece, run: Run) -> PieceCall:
        inputs = (*(self._numbers[n] for n in piece.inputs), *self._lifted_by_piece[id(piece)])
        return PieceCall(run, inputs, tuple(self._numbers[n] for n in piece.outputs))

    def _function_call(self, call: GraphCall) -> FunctionCall:
        node = call.node
        function: Any = node.target
        if node.op == "call_method":
            name = str(node.target)

            def function(owner: Any, *args: Any, **kwargs: Any) -> Any:
                return getattr(owner, name)(*args, **kwargs)

        args: Sequence[Any] = node.args
        kwargs: Mapping[str, Any] = node.kwargs
        declared = declared_op(node.target)
        if declared is not None:
            function = _current(declared)
            args, kwargs = _converted(declared.overload, args, kwargs)
        return FunctionCall(
            function=function,
            args=tuple(self._argument(a) for a in args),
            kwargs={k: self._argument(v) for k, v in kwargs.items()},
            output=self._numbers[node],
            items=tuple((index, self._numbers[item]) for index, item in call.items),
        )

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return Slot(self._numbers[value])
        if isinstance(value, tuple):
            return tuple(self._argument(v) for v in value)
        if isinstance(value, list):
            return [self._argument(v) for v in value]
        return value


def _requires_grad(output: Any) -> bool:
    value = example(output) if isinstance(output, torch.fx.Node) and output.op != "placeholder" else None
    return isinstance(value, torch.Tensor) and value.requires_grad


def _shape(steps: Sequence[GraphPiece | GraphCall], described: Mapping[int, DescribedPiece]) -> str | None:
    texts: list[Any] = []
    for i, step in enumerate(steps):
        text = described[i].text if isinstance(step, GraphPiece) else _call_shape(step)
        if text is None:
            return None
        texts.append(text)
    return digest_json(texts)


def _call_shape(call: GraphCall) -> list[Any]:
    """Write a call of an opaque operator down, but not its constants."""
    return [str(call.node.target), [type(a).__name__ for a in call.node.args], sorted(call.node.kwargs)]


def _attribute(module: torch.nn.Module, node: torch.fx.Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _current(declared: OpaqueOp) -> Callable[..., Any]:
    """Call a declared operator's function as it is then: its module may be imported again."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return declared.function(*args, **kwargs)

    return call


def _converted(overload: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return constants as the dispatcher, which isn't asked, would pass them: 2 for a float is 2.0."""
    types = {a.name: a.type for a in operator_arguments(overload)}

    def convert(value: Any, declared: str) -> Any:
        return float(value) if declared in {"float", "Optional[float]"} and type(value) is int else value

    positional = [convert(v, t) for v, t in zip(args, types.values(), strict=False)]
    return positional, {k: convert(v, types.get(k, "")) for k, v in kwargs.items()}
