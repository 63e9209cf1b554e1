"""`torch.compile(model, backend="piecework")`: each different piece of what Dynamo captures, compiled once.

Registered with torch by this package's entry point, so nothing needs to be imported. Dynamo guards, recompiles and
breaks graphs as for any backend; this file turns one of its graphs into a function.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from piecework.compiler.jit import JitPiece, compile_jit, jit_key, load_jit
from piecework.compiler.jit_options import JitBackendName, JitOptions, parse_options
from piecework.errors import BackwardError, PieceworkError, StoreError
from piecework.foundation.environment import read_environment
from piecework.foundation.torch_private import holds, operator_name, size_bounds
from piecework.graph.dynamo_module import SizeRange, piece_module, plain_module
from piecework.graph.dynamo_split import GraphCall, GraphPiece, example, output_nodes, split_graph
from piecework.graph.dynamo_text import DescribedPiece, aliased, describe, writes_in_place
from piecework.ops.lifted import Lifted
from piecework.ops.opaque import implementation
from piecework.ops.opaque_op import declared_op
from piecework.record import Recorder
from piecework.runtime.call_list import CallList, FunctionCall, PieceCall, Slot
from piecework.store.directory_store import DirectoryStore
from piecework.store.lookup import find_artifact
from piecework.store.stores import Kind, Store

_LOG = logging.getLogger("piecework")
_Run = Callable[..., Sequence[Any]]


class DynamoBackend:
    """A backend of torch.compile. Holds on to the pieces that are in use, so that graphs of one process share them."""

    def __init__(self) -> None:
        self._in_use: weakref.WeakValueDictionary[str, _Shared] = weakref.WeakValueDictionary()
        self.__name__ = "piecework"

    def __call__(
        self,
        module: torch.fx.GraphModule,
        inputs: Sequence[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph of Dynamo's for inference.

        What a user did wrong is raised as it is when the compiled function is called; torch would wrap what is raised
        here.
        """
        try:
            chosen = parse_options(options, mode=mode)
            compiled = _GraphCompile(module, options=chosen, in_use=self._in_use).compile()
        except PieceworkError as error:
            return _raising(error)
        needs_grad = torch.is_grad_enabled() and any(isinstance(i, torch.Tensor) and i.requires_grad for i in inputs)
        return _without_backward(compiled) if needs_grad else compiled

    def reset(self) -> None:
        """Forget what is in use; torch calls this in `torch._dynamo.reset()`."""
        self._in_use.clear()


@dataclass(frozen=True)
class _Shared:
    """A piece in use; weakly known to the backend."""

    piece: JitPiece
    __weakref__: Any = None


class _GraphCompile:
    """Compiles one graph."""

    def __init__(
        self,
        module: torch.fx.GraphModule,
        *,
        options: JitOptions,
        in_use: weakref.WeakValueDictionary[str, _Shared],
    ) -> None:
        self._module = module
        self._options = options
        self._in_use = in_use
        self._recorder = options.recorder or Recorder()
        self._store = _open_store(self._recorder) if options.store else None
        self._here: dict[str, _Run] = {}
        self._numbers: dict[torch.fx.Node, int] = {}
        self._constants: list[Any] = []

    def compile(self) -> CallList:
        """Return the graph as a function of its inputs."""
        graph = self._module.graph
        with self._recorder.phase("split"):
            steps = split_graph(graph, is_cut=self._is_cut)
            described = {
                i: describe(s, lift=self._options.lift_names) for i, s in enumerate(steps) if isinstance(s, GraphPiece)
            }
        self._number(graph, steps, described)
        with self._recorder.phase("compile"):
            runs = {i: self._run(d) for i, d in described.items()}
        calls = [
            self._piece_call(s, described[i], runs[i]) if isinstance(s, GraphPiece) else self._function_call(s)
            for i, s in enumerate(steps)
        ]
        self._note(described)
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        return CallList(
            num_inputs=len(placeholders),
            constants=self._constants,
            num_values=self._num_values,
            calls=calls,
            results=[self._argument(o) for o in output_nodes(graph)],
        )

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

    def _piece_call(self, piece: GraphPiece, described: DescribedPiece, run: _Run) -> PieceCall:
        inputs = (*(self._numbers[n] for n in piece.inputs), *self._lifted_by_piece[id(piece)])
        return PieceCall(run, inputs, tuple(self._numbers[n] for n in piece.outputs))

    def _function_call(self, call: GraphCall) -> FunctionCall:
        node = call.node
        function: Any = node.target
        if node.op == "call_method":
            name = str(node.target)

            def function(owner: Any, *args: Any, **kwargs: Any) -> Any:
                return getattr(owner, name)(*args, **kwargs)

        elif operator_name(node.target) is not None:
            function = implementation(_qualified(node.target))
        return FunctionCall(
            function=function,
            args=tuple(self._argument(a) for a in node.args),
            kwargs={k: self._argument(v) for k, v in node.kwargs.items()},
            output=self._numbers[node],
            items=tuple((index, self._numbers[item]) for index, item in call.items),
        )

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return Slot(self._numbers[value])
        if isinstance(value, (list, tuple)):
            return type(value)(self._argument(v) for v in value)
        return value

    def _run(self, described: DescribedPiece) -> _Run:
        """Return the function of a piece: one that is in use, or in the store, or made now."""
        self._recorder.count("pieces")
        eager = self._options.backend is JitBackendName.EAGER or self._runs_eagerly(described)
        ranges = self._ranges(described)
        key = jit_key(described, {n: (r.low, r.high) for n, r in ranges.items()}, eager=eager)
        if key is not None and key in self._here:
            return self._here[key]
        self._recorder.count("unique_pieces")
        if key is None:
            self._recorder.note(f"a piece is shared with no other: {described.why_not}")
            return self._made(described, ranges=ranges, key=None, eager=eager).run
        shared = self._in_use.get(key)
        if shared is not None:
            self._recorder.count("in_use")
        else:
            stored = None if eager else self._stored(key)
            shared = _Shared(stored or self._made(described, ranges=ranges, key=key, eager=eager))
            self._in_use[key] = shared
        if not self._applies(shared.piece, described):
            self._recorder.note("a piece that is there already does not hold for these sizes")
            return self._made(described, ranges=ranges, key=None, eager=eager).run
        return self._here.setdefault(key, _holding(shared))

    def _runs_eagerly(self, described: DescribedPiece) -> bool:
        """Whether a piece is left to eager mode: one that writes to memory that two of its inputs share."""
        found = aliased(described.piece.inputs) and writes_in_place(described.piece.nodes)
        if found:
            self._recorder.note("a piece that writes to memory which two of its inputs share runs eagerly")
        return found

    def _ranges(self, described: DescribedPiece) -> dict[str, SizeRange]:
        bounds: dict[str, tuple[int, int, int]] = {}
        for node in described.piece.inputs:
            value = example(node)
            sizes = [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    bounds.update(size_bounds(size))
        return {ours: SizeRange(*bounds[theirs]) for theirs, ours in described.symbols.items()}

    def _stored(self, key: str) -> JitPiece | None:
        if self._store is None:
            return None
        artifact = find_artifact(self._store, key, report=self._recorder.note)
        if artifact is None:
            return None
        try:
            with self._recorder.phase("load"):
                found = load_jit(artifact.path)
        except PieceworkError as error:
            self._store.set_aside(Kind.ARTIFACT, key, reason=error.found)
            self._recorder.note(f"set aside the artifact {key}: {error.found}")
            return None
        self._recorder.count("store_hits")
        return found

    def _made(
        self, described: DescribedPiece, *, ranges: Mapping[str, SizeRange], key: str | None, eager: bool
    ) -> JitPiece:
        self._recorder.count("compiled")
        if eager:
            return JitPiece(plain_module(described), ())
        made = piece_module(described, ranges=ranges)
        piece = compile_jit(made, described, store=self._store, key=key, report=self._recorder.note)
        self._applies(piece, described)  # the frame is guarded by what the code relies on
        return piece

    def _applies(self, piece: JitPiece, described: DescribedPiece) -> bool:
        """Whether the conditions of a compiled piece hold here; the frame is guarded by them."""
        if not piece.conditions:
            return True
        sizes: dict[str, torch.SymInt] = {}
        for node in described.piece.inputs:
            value = example(node)
            for size in [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]:
                if isinstance(size, torch.SymInt) and str(size.node.expr) in described.symbols:
                    sizes[described.symbols[str(size.node.expr)]] = size
        return all(holds(condition, sizes) for condition in piece.conditions)

    def _note(self, described: Mapping[int, DescribedPiece]) -> None:
        self._recorder.count("graphs")
        self._recorder.count("names_lifted", by=sum(len(d.values) for d in described.values()))
        record = self._recorder.finish()
        _LOG.info("compiled a graph: %s", ", ".join(f"{n} {c}" for n, c in record.counts.items()))


def _open_store(recorder: Recorder) -> Store | None:
    try:
        return DirectoryStore(read_environment().store_root)
    except StoreError as error:
        recorder.note(f"there is no store: {error.found}")
        return None


def _holding(shared: _Shared) -> _Run:
    """Return the piece's function, which keeps `shared` alive."""
    run = shared.piece.run

    def call(*args: Any, _shared: _Shared = shared) -> Sequence[Any]:
        return run(*args)

    return call


def _attribute(module: torch.nn.Module, node: torch.fx.Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _qualified(target: Any) -> str:
    name = operator_name(target)
    overload = getattr(target, "_overloadname", "") or "default"
    return f"{name}.{overload}"


def _raising(error: PieceworkError) -> Callable[..., Any]:
    def compiled(*_inputs: Any) -> Any:
        raise error

    return compiled


class _NoBackward(torch.autograd.Function):
    """Passes tensors on; a backward pass through it is refused."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(o.view_as(o) for o in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise BackwardError(
            asked="a backward pass through a model that piecework compiled",
            found='torch.compile(backend="piecework") compiles for inference only',
            try_="train with another backend, or detach the result",
        )


def _without_backward(compiled: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """Let results require gradients, as they would in eager mode, and a backward pass say why there are none."""

    def call(*inputs: Any) -> tuple[Any, ...]:
        outputs = compiled(*inputs)
        anchor = next(i for i in inputs if isinstance(i, torch.Tensor) and i.requires_grad)
        places = [i for i, o in enumerate(outputs) if isinstance(o, torch.Tensor) and o.is_floating_point()]
        if not places:
            return outputs
        passed: Any = _NoBackward.apply(anchor, *(outputs[i] for i in places))  # type: ignore[no-untyped-call]
        changed = dict(zip(places, passed, strict=True))
        return tuple(changed.get(i, o) for i, o in enumerate(outputs))

    return call


backend = DynamoBackend()
"""What the entry point `torch_dynamo_backends: piecework` names."""
