"""A tape: what the forward of one block asked torch for, call by call, written down while it was traced.

Tensors stand on it as `Made` (by an earlier call on the tape) and `Taken` (from elsewhere: an argument, a weight).
Everything else stands on it as it is. replay.py runs the forwards of other blocks against it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

from piecework.capture.tensors import NamedTensors
from piecework.foundation.torch_private import Tracer, call_arguments, last_node, nodes_after, operator_name

Place = tuple[str, tuple[int, ...]]
"""An argument of an operator's call: its name in the schema, and the indices inside nested lists."""

Shape = Sequence[tuple[str, type]]
"""Names and classes of a block's modules."""

_SIZES: Final = (torch.SymInt, torch.SymBool, torch.SymFloat)
_RESULTS: Final = (
    *(NoneType, bool, int, float, complex, str, torch.Size, torch.dtype, torch.device, torch.layout),
    torch.memory_format,
    *_SIZES,
)
"""What a call may give besides tensors, so that it can be given to another block as well."""


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that a call on the tape gave; `index` counts them."""

    index: int


@dataclass(frozen=True, slots=True)
class Taken:
    """A tensor from outside the tape; an index into `Tape.taken`."""

    index: int


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from that a block takes.

    Attributes:
        name: of a weight, buffer or state of the model, else None.
        node: its node, None for a tensor that the trace doesn't know.
        tensor: the tensor where it has neither, else None.
        metadata: what is equal in every block that shares the tape.
    """

    name: str | None
    node: torch.fx.Node | None
    tensor: torch.Tensor | None
    metadata: Any


@dataclass(frozen=True)
class TorchCall:
    """A call of one of torch's functions or of an operator.

    Attributes:
        function: what was called.
        arguments: (args, kwargs); for an opaque op a dict by the names of its schema.
        result: what it gave.
        setting: dtype defaults and autocast, which change what a call means.
        node: the call in the graph, for an opaque op: its constants may be others in another block. Else None.
    """

    function: Any
    arguments: Any
    result: Any
    setting: Any
    node: torch.fx.Node | None


@dataclass(frozen=True)
class BlockCall:
    """A call of a block inside the block, which has a tape of its own.

    Attributes:
        template: the tape that the inner block shares, and its nodes.
        taken: what it took for each entry of its tape's `taken`, as written on this tape.
        nodes: its template's nodes → its own.
        result: what it gave.
    """

    template: Template
    taken: Sequence[Any]
    nodes: Mapping[torch.fx.Node, torch.fx.Node]
    result: Any


@dataclass
class Tape:
    """What a block's forward did, in order.

    Attributes:
        calls: what it called.
        taken: where the tensors come from that it took from outside.
        num_made: how many tensors its calls gave.
        result: what it returned.
        problems: why it holds for this block only.
    """

    calls: list[TorchCall | BlockCall] = field(default_factory=list)
    taken: list[Source] = field(default_factory=list)
    num_made: int = 0
    result: Any = None
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Returned:
    """A tensor that a traced block computed and returned: how it looks, and its node."""

    shape: Sequence[int | torch.SymInt]
    stride: Sequence[int | torch.SymInt]
    dtype: torch.dtype
    device: torch.device
    node: torch.fx.Node


@dataclass(frozen=True, eq=False)
class Template:
    """A traced block that others may be like: its tape, its nodes, and the tensors that it returned.

    Attributes:
        tape: what its forward did.
        nodes: what was traced.
        shape: names and classes of the block's modules.
        returned: what the tensors in the result look like.
    """

    tape: Tape
    nodes: Sequence[torch.fx.Node]
    shape: Shape
    returned: Mapping[Made, Returned]


def written(value: Any, write: Callable[[torch.Tensor], Any]) -> Any:
    """Return nested arguments with `write(tensor)` in place of each tensor."""
    if isinstance(value, torch.Tensor):
        return write(value)
    kind = type(value)
    if kind in (tuple, list):
        return kind(written(v, write) for v in value)
    if kind is dict:
        return {k: written(v, write) for k, v in value.items()}
    if kind is slice:
        return slice(*(written(v, write) for v in (value.start, value.stop, value.step)))
    return value


def setting() -> tuple[Any, ...]:
    """Return what code may have changed around a call and what changes the call's meaning."""
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return (*autocast, torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())


class Writer:
    """Writes a tape while a block is traced.

    Args:
        tracer: the trace.
        tensors: the model's tensors.
        is_opaque: says of an operator's name whether the graph is cut there.
    """

    def __init__(self, tracer: Tracer, *, tensors: NamedTensors, is_opaque: Callable[[str], bool]) -> None:
        self.tape = Tape()
        self._tracer = tracer
        self._tensors = tensors
        self._is_opaque = is_opaque
        self._start = self._last = last_node(tracer.graph)
        self._known: dict[int, Made | Taken] = {}
        self._made: list[torch.Tensor] = []
        self._taken: list[torch.Tensor] = []

    def call(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Call one of torch's functions, and write it down."""
        arguments = written((args, kwargs), self._take)
        self._see_outside()
        before, around = last_node(self._tracer.graph), setting()
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            self.tape.problems.append(f"goes on after a {type(error).__name__} of torch's")
            raise
        name, node = operator_name(function), None
        if name is not None and self._is_opaque(name):
            made = nodes_after(self._tracer.graph, before)
            node = next((n for n in made if operator_name(n.target) == name), None)
        if node is not None:
            arguments = call_arguments(node.target, *arguments)
        self._last = last_node(self._tracer.graph)
        self.tape.calls.append(TorchCall(function, arguments, self._write_result(result, function), around, node))
        return result

    def block(
        self,
        template: Template | None,
        *,
        taken: Sequence[torch.Tensor],
        nodes: Mapping[torch.fx.Node, torch.fx.Node],
        result: Any,
    ) -> None:
        """Write down the call of an inner block, which was traced or stamped; None where it is no template."""
        self._last = last_node(self._tracer.graph)
        if template is None:
            self.tape.problems.append("has a block inside that is traced by itself")
        else:
            inner = [written(t, self._take) for t in taken]
            leaves, spec = pytree.tree_flatten(result)
            made = pytree.tree_unflatten([written(x, self._make) for x in leaves], spec)
            self.tape.calls.append(BlockCall(template, inner, nodes, made))

    def _take(self, tensor: torch.Tensor) -> Made | Taken:
        known = self._known.get(id(tensor))
        if known is None:
            known = self._known[id(tensor)] = Taken(len(self._taken))
            self._taken.append(tensor)
            self.tape.taken.append(source_of(tensor, self._tracer, self._tensors))
        return known

    def _make(self, tensor: torch.Tensor) -> Made | Taken:
        known = self._known.get(id(tensor))
        if known is None:
            known = self._known[id(tensor)] = Made(len(self._made))
            self._made.append(tensor)
            self.tape.num_made += 1
        return known

    def _write_result(self, result: Any, function: Any) -> Any:
        leaves, spec = pytree.tree_flatten(result)
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                if id(leaf) not in self._known and self._tracer.node_of(leaf) is None:
                    self.tape.problems.append("gets a tensor that the trace doesn't know")
            elif not isinstance(leaf, _RESULTS):
                self.tape.problems.append(f"gets a {type(leaf).__name__} from {function!r}")
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            return result
        return pytree.tree_unflatten([written(x, self._make) for x in leaves], spec)

    def _see_outside(self) -> None:
        """Note nodes that none of the calls made; sizes are computed by Python's operators."""
        if any(not isinstance(n.meta.get("val"), _SIZES) for n in nodes_after(self._tracer.graph, self._last)):
            self.tape.problems.append("computes something past torch's Python functions")

    def finish(self, result: Any, *, shape: Shape) -> Template:
        """Return the template of a block that has returned `result`."""
        self._see_outside()
        nodes = list(nodes_after(self._tracer.graph, self._start))
        leaves, spec = pytree.tree_flatten(result)
        for leaf in leaves:
            if not isinstance(leaf, (torch.Tensor, *_RESULTS)):
                self.tape.problems.append(f"returns a {type(leaf).__name__}")
        self.tape.result = pytree.tree_unflatten([written(x, self._take) for x in leaves], spec)
        self._see_inputs(nodes)
        own = set(nodes)
        returned = {}
        for leaf in leaves:
            known = self._known.get(id(leaf))
            if isinstance(known, Made):
                node = self._tracer.node_of(leaf)
                if node is None or node not in own:
                    self.tape.problems.append("returns a tensor that it neither computed nor was given")
                else:
                    returned[known] = Returned(leaf.shape, leaf.stride(), leaf.dtype, leaf.device, node)
        return Template(self.tape, nodes, shape, returned)

    def see_kept(self) -> None:
        """Note where a tensor that the block computed lives on, now that nobody needs it: another block may find it."""
        made = [weakref.ref(t) for t in self._made]
        self._made.clear()
        if any(ref() is not None for ref in made):
            self.tape.problems.append("keeps a tensor that it computed where another block may find it")

    def taken(self) -> Sequence[torch.Tensor]:
        """Return the tensors that the block took from outside."""
        return self._taken

    def _see_inputs(self, nodes: Sequence[torch.fx.Node]) -> None:
        known = {*nodes, *(s.node for s in self.tape.taken)}
        for node in nodes:
            if isinstance(node.meta.get("val"), _SIZES):
                continue  # a size that another block has as well, read from a tensor that is outside of both
            for source in node.all_input_nodes:
                if source not in known and not isinstance(source.meta.get("val"), _SIZES):
                    self.tape.problems.append(f"takes {source.target} otherwise than as an argument of torch's")


def source_of(tensor: torch.Tensor, tracer: Tracer, tensors: NamedTensors) -> Source:
    """Return where a tensor comes from that isn't made by the calls on a tape."""
    name = tensors.name_of(tensor)
    if name is not None:
        return Source(name, tensors.nodes[name], None, None)
    node = tracer.node_of(tensor)
    return Source(None, node, tensor if node is None else None, metadata(tensor))


def metadata(value: Any) -> Any:
    """Return shape, strides, dtype, device and layout of the tensors in a nested value, as nested tuples."""
    if isinstance(value, torch.Tensor):
        sizes = tuple(_size(d) for d in value.shape), tuple(_size(d) for d in value.stride())
        return (*sizes, value.dtype, value.device.type, value.layout)
    if isinstance(value, (tuple, list)):
        return tuple(metadata(v) for v in value)
    return _size(value) if isinstance(value, torch.SymInt) else value


def _size(size: int | torch.SymInt) -> Any:
    return size if isinstance(size, int) else size.node.expr
