"""Trace a module into one functional graph of aten operators, with weights, buffers and states as named inputs.

`capture` traces each structurally different block of a stack once and stamps the others (stamping.py). With
`templates=False` it traces every block: the fallback and the oracle that stamped graphs are tested against.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from piecework.bundle.sizes import size_expression
from piecework.capture.blocks import marking_blocks
from piecework.capture.cuts import is_opaque
from piecework.capture.general import Forward, holds_for_one, mentions, require_whole_ranges
from piecework.capture.held import BuffersChange, require_held, write_back
from piecework.capture.locations import KeepLines, is_models, note_lines
from piecework.capture.memory import (
    bases_of,
    changed_inputs,
    forget_results_of_writes,
    is_step,
    kept_memory,
    views_of,
    written_by,
)
from piecework.capture.request import CaptureRequest, SizeInput, TensorInput
from piecework.capture.sources import Unwatched, class_files, is_users, ran_files
from piecework.capture.stamping import StackCounts, Stamping, TraceAgain, stamping
from piecework.capture.structure import Structure, changed, flatten
from piecework.capture.tensors import NamedTensors
from piecework.errors import CaptureError, InternalError, PieceworkError
from piecework.foundation import torch_private
from piecework.foundation.digests import digest_bytes, digest_json
from piecework.ops.ir.layer import LayerName
from piecework.ops.linear import KeepLinear
from piecework.ops.recurrent_layers import KeepRecurrent


class InputKind(Enum):
    """Where a graph input comes from."""

    ARGUMENT = "argument"
    HELD = "held"
    WEIGHT = "weight"
    STATE = "state"


@dataclass(frozen=True)
class GraphInput:
    """One input of a captured graph: its kind, its name, and its placeholder."""

    kind: InputKind
    name: str
    node: torch.fx.Node


@dataclass(frozen=True)
class CapturedGraph:
    """A model's forward as one graph.

    Attributes:
        graph: functional aten graph; placeholders are `inputs`, the output node holds the flat outputs.
        inputs: arguments first, then held buffers, weights, and states; unused weights are left out.
        structure: how the flat outputs make up the module's result.
        size_names: the graph's symbols ("s12") → declared size names ("tokens").
        literals: buffers that are not in checkpoints (non-persistent), by name, with their values.
        sources: files whose code ran while tracing.
        stacks: how many blocks were traced and stamped.
        request: what was captured.
        views: views of memory to which the graph writes; each piece and each step makes those that it reads.
    """

    graph: torch.fx.Graph
    inputs: tuple[GraphInput, ...]
    structure: Structure
    size_names: Mapping[str, str]
    literals: Mapping[str, torch.Tensor]
    sources: frozenset[Path]
    stacks: StackCounts
    request: CaptureRequest
    views: frozenset[torch.fx.Node] = frozenset()


def capture(request: CaptureRequest, *, templates: bool = True) -> CapturedGraph:
    """Trace `request.module` for its whole declared range of sizes.

    Raises CaptureError where the module can't be traced as one graph, ShapeContractError where the trace holds for a
    part of a declared range only.
    """
    one_by_one: frozenset[type] = frozenset()
    general = bool(request.values)
    while True:
        try:
            graph, trace = _traced(request, templates=templates, one_by_one=one_by_one, general=general)
        except TraceAgain as again:
            if again.cls in one_by_one:
                raise InternalError(f"{again.cls.__name__} is traced again and again") from again
            one_by_one |= {again.cls}
            continue
        captured = _captured(graph, trace)
        assumed = {size for guard in trace.session.assumed for size in request.sizes if mentions(guard.expr, size)}
        names = {i.node: i.name for i in captured.inputs}
        if not assumed or holds_for_one(Forward(captured.graph, names, captured.literals, request), assumed):
            return captured
        general = False


@dataclass(frozen=True)
class _Trace:
    """A trace that has ended: what was traced, on which sizes, tensors and arguments, and what came of it."""

    request: CaptureRequest
    session: torch_private.SymbolicSession
    tensors: NamedTensors
    arguments: Sequence[Any]
    structure: Structure
    counts: StackCounts
    sources: frozenset[Path]


def _traced(
    request: CaptureRequest, *, templates: bool, one_by_one: frozenset[type], general: bool
) -> tuple[torch.fx.Graph, _Trace]:
    """Run the module under a trace.

    Args:
        request: the module.
        templates: whether blocks are stamped.
        one_by_one: classes whose blocks are not.
        general: whether code that asks if a size is 1 hears no, unguarded, for `holds_for_one` to be asked later.
    """
    session = torch_private.SymbolicSession(is_users=is_users)
    sizes = {n: session.size(n, low=d.min, high=d.max, hint=d.traced) for n, d in request.traced_sizes.items()}
    arguments = [_argument(i, sizes=sizes, session=session) for i in request.inputs]
    tensors = NamedTensors(
        request.module, states=request.states, sizes=sizes, fake_mode=session.fake_mode, device=request.device
    )
    result: dict[str, Structure] = {}
    sources = class_files(request.module)
    stamped = Stamping(StackCounts(), frozenset(), contextlib.nullcontext())
    with contextlib.ExitStack() as stack:
        stack.callback(tensors.restore)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_our_errors())
        answer = session.general_answer if general else torch_private.unanswered
        stack.enter_context(torch_private.size_oblivious(answer))
        stack.enter_context(_one_convolution())
        stack.enter_context(torch_private.grouped_products_of_any_type())
        if templates:
            fake_mode, opaque = session.fake_mode, request.opaque
            stamped = stack.enter_context(
                stamping(request.module, tensors=tensors, fake_mode=fake_mode, opaque=opaque, one_by_one=one_by_one)
            )

        stack.enter_context(marking_blocks(request.module))

        def forward(*values: Any) -> list[Any]:
            tracer = torch_private.current_tracer()
            assert tracer is not None
            tensors.begin(tracer)
            tracer.keep(LayerName, *map(type, request.objects.values()))
            note_lines(tracer, is_wanted=is_models(request.module))
            for name in request.held or ():
                tensors.fake(tensors.by_name[name])
            tensors.swap(m for m in request.module.modules() if m not in stamped.parts)
            named = {i.name: v for i, v in zip(request.inputs, values, strict=True)}
            with ran_files(sources), Unwatched(), stamped.calls:
                out, result["structure"] = flatten(request.call(request.module, named))
            write_back(tensors, request)
            return out

        stack.enter_context(session.fake_mode)
        stack.enter_context(KeepLinear())
        stack.enter_context(KeepRecurrent())
        traced = torch_private.trace(forward, arguments)
        require_held(tensors.replaced(), request)
    _adopt_constants(traced, tensors=tensors)
    trace = _Trace(request, session, tensors, arguments, result["structure"], stamped.counts, frozenset(sources))
    return traced.graph, trace


def _captured(graph: torch.fx.Graph, trace: _Trace) -> CapturedGraph:
    """Make a trace's graph functional, check it, and name its inputs."""
    request, tensors = trace.request, trace.tensors
    held = request.held or ()
    names = [*held, *(n for n in tensors.by_name if n in tensors.nodes and n not in held)]
    graph, order = _without_writes(graph, trace, names=names)
    require_whole_ranges(trace.session.narrowing_guards(), request)
    kinds = [InputKind.ARGUMENT] * len(request.inputs) + [InputKind.HELD] * len(held)
    kinds += [InputKind.STATE if n in request.states else InputKind.WEIGHT for n in names[len(held) :]]
    inputs = tuple(
        GraphInput(k, n, p) for k, n, p in zip(kinds, [*(i.name for i in request.inputs), *names], order, strict=True)
    )
    _canonicalize(graph, opaque=request.opaque)
    used = tuple(i for i in inputs if i.kind in (InputKind.ARGUMENT, InputKind.HELD) or i.node.users)
    for unused in set(inputs) - set(used):
        graph.erase_node(unused.node)
    persistent = set(request.module.state_dict(keep_vars=True))
    return CapturedGraph(
        graph=graph,
        inputs=used,
        structure=changed(trace.structure, partial(_named_size, names=trace.session.symbol_names())),
        size_names=trace.session.symbol_names(),
        literals={
            i.name: tensors.by_name[i.name].detach()
            for i in used
            if i.kind in (InputKind.WEIGHT, InputKind.HELD)
            and i.name not in persistent
            and not tensors.by_name[i.name].is_meta
        },
        sources=trace.sources,
        stacks=trace.counts,
        request=request,
        views=views_of(graph, opaque=request.opaque),
    )


def _named_size(end: Structure, *, names: Mapping[str, str]) -> Structure:
    """Return an end of a result's structure with a size as text over the declared sizes."""
    if "size" not in end:
        return end
    try:
        return {"size": torch_private.expression_text(end["size"].node.expr, names)}
    except ValueError:
        raise CaptureError(
            asked="a result of tensors, and of sums, products and quotients of sizes",
            found=f"the number {end['size']}, which depends on values or is another function of sizes",
            try_="return a tensor, or compute the number of the result's shape",
        ) from None


def _argument(given: TensorInput | SizeInput, *, sizes: Mapping[str, Any], session: Any) -> Any:
    if isinstance(given, SizeInput):
        return sizes[given.size]
    return _fake_tensor(given, sizes=sizes, session=session, device=given.device)


def _fake_tensor(given: TensorInput, *, sizes: Mapping[str, Any], session: Any, device: str) -> torch.Tensor:
    shape = [size_expression(d)(sizes) if isinstance(d, str) else d for d in given.shape]
    dtype = getattr(torch, given.dtype)
    with session.fake_mode:
        if given.stride is None:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty_strided(shape, given.stride, dtype=dtype, device=device)


def _without_writes(
    graph: torch.fx.Graph, trace: _Trace, *, names: Sequence[str]
) -> tuple[torch.fx.Graph, list[torch.fx.Node]]:
    """Return the graph, functional but for writes to memory that is kept, and its inputs in order: arguments, names."""
    request, tensors = trace.request, trace.tensors
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    made = set(tensors.nodes.values())
    order = [*(n for n in placeholders if n not in made), *(tensors.nodes[n] for n in names)]
    kept = kept_memory(graph, opaque=request.opaque)
    if not request.may_write:
        labels = dict(zip(order, [*(i.name for i in request.inputs), *names], strict=True))
        changes = {labels[n] for n in changed_inputs(graph, opaque=request.opaque)}
        require_held(changes.difference(request.held or ()), request)
    if _mutates(graph, opaque=request.opaque, kept=kept):
        fakes = [*trace.arguments, *(tensors.fresh_fake(n) for n in names)]
        with _our_errors(), torch.no_grad(), torch_private.size_oblivious(), trace.session.fake_mode:
            graph, order = _functionalized(graph, order=order, fakes=fakes, kept=kept, request=request)
    forget_results_of_writes(graph)
    return graph, order


def _functionalized(
    graph: torch.fx.Graph,
    *,
    order: Sequence[torch.fx.Node],
    fakes: Sequence[Any],
    kept: frozenset[torch.fx.Node],
    request: CaptureRequest,
) -> tuple[torch.fx.Graph, list[torch.fx.Node]]:
    """Trace `graph` again with writes replaced, but for those to memory in `kept`.

    Args:
        graph: the graph.
        order: its inputs.
        fakes: a value for each of them.
        kept: see `memory.kept_memory`.
        request: what is captured.

    Returns the new graph, and its inputs in the same order.
    """
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    places = {node: number for number, node in enumerate(order)}
    inputs = [places[n] for n in graph.nodes if n.op == "placeholder"]
    bases = bases_of(graph)
    apart = {n for n in graph.nodes if bases[n] in kept or any(bases[w] in kept for w in written_by(n))}

    def run(*values: Any) -> Any:
        tracer = torch_private.current_tracer()
        assert tracer is not None
        tracer.keep(LayerName, *map(type, request.objects.values()))
        replay = _Replay(module, tracer=tracer, apart=apart)
        others = [values[i] for i in inputs if order[i] not in kept]

        def run_others(*functional: Any) -> Any:
            given = iter(functional)
            return replay.run(*(values[i] if order[i] in kept else next(given) for i in inputs))

        return torch_private.functionalized(run_others)(*others)

    made = torch_private.trace(run, fakes).graph
    return made, [n for n in made.nodes if n.op == "placeholder"]


class _Replay(KeepLines):
    """Runs a graph inside `functionalized`, and the nodes that are `apart` outside of it, on the real tensors."""

    def __init__(
        self, module: torch.fx.GraphModule, *, tracer: torch_private.Tracer, apart: Container[torch.fx.Node]
    ) -> None:
        super().__init__(module, tracer=tracer)
        self._apart = apart

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """See `torch.fx.Interpreter.call_function`."""
        if self.node not in self._apart:
            return tree_map(torch_private.functional, super().call_function(target, args, kwargs))
        args, kwargs = tree_map(torch_private.real, (args, kwargs))
        with torch_private.not_functionalized():
            return super().call_function(target, args, kwargs)

    def run_node(self, n: torch.fx.Node) -> Any:
        """See `torch.fx.Interpreter.run_node`."""
        self.node = n
        return super().run_node(n)


def _one_convolution() -> contextlib.AbstractContextManager[None]:
    """Leave NNPACK out, which torch would take from 16 images on: the operator in the graph is the same."""
    made: contextlib.AbstractContextManager[None] = torch.backends.nnpack.flags(enabled=False)
    return made


@contextlib.contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except (PieceworkError, BuffersChange):
        raise
    except torch_private.data_dependent_errors() as error:
        raise CaptureError(
            asked="capture the module as one graph",
            found=f"a step depends on the values of a tensor, not on its shape: {_first_line(error)}",
            try_="compute it with tensor operations (torch.where, masks), or hide it in an opaque operator",
            location=_user_line(error),
        ) from error
    except Exception as error:
        raise CaptureError(
            asked="capture the module as one graph",
            found=f"{type(error).__name__}: {_first_line(error)}",
            try_="run the module eagerly on the example inputs first; what works there and not here can't be traced",
            location=_user_line(error),
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _user_line(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _mutates(graph: torch.fx.Graph, *, opaque: frozenset[str], kept: frozenset[torch.fx.Node]) -> bool:
    """Whether the graph writes to memory that it has made, by torch's own operators."""
    bases = bases_of(graph)
    return any(bases[w] not in kept for n in graph.nodes if not is_opaque(n, opaque) for w in written_by(n))


def _adopt_constants(traced: torch.fx.GraphModule, *, tensors: NamedTensors) -> None:
    """Make tensors that the module's code holds or writes down itself inputs of the graph."""
    placeholders: dict[str, torch.fx.Node] = {}
    for node in [n for n in traced.graph.nodes if n.op == "get_attr"]:
        value = getattr(traced, str(node.target))
        name = _constant_name(value)  # forwards of one model have each their own constants, in one bundle
        if name not in placeholders:
            placeholders[name] = tensors.node(name, like=node.meta["val"])
            tensors.adopt(name, value, node=placeholders[name])
        node.replace_all_uses_with(placeholders[name])
        traced.graph.erase_node(node)


def _constant_name(value: torch.Tensor) -> str:
    content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"constant:{digest_json([str(value.dtype), list(value.shape), digest_bytes(content)])[:16]}"


def _canonicalize(graph: torch.fx.Graph, *, opaque: frozenset[str]) -> None:
    """Compute every symbolic size once, directly after the placeholders' first use, and drop what nobody uses."""
    first: dict[str, torch.fx.Node] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.SymInt):
            continue
        known = first.setdefault(str(value.node.expr), node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not is_step(node, opaque):
            graph.erase_node(node)
