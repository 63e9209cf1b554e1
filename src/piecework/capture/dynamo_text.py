"""A piece of a Dynamo graph as text: what the compiler gets to see of it, and nothing else.

Pieces with equal text share one compiled artifact. The text has no names of nodes, weights or layers; strings and
numbers that custom operators take are left out and become inputs of the piece ("lifted"). What can't be written down so
that another process understands it (a Python function of the user's in the graph, say) has no text, and such a piece is
shared with no other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from piecework.capture.dynamo_split import GraphPiece, example
from piecework.foundation.digests import digest_json
from piecework.foundation.torch_private import (
    decomposes,
    function_name,
    is_python_object,
    operator_arguments,
    real_object,
    single_overload,
    storage_key,
)

SYMBOL = re.compile(r"\b[suzf]+\d+\b")
"""A size in the text of an expression."""

_OWN = frozenset(
    {
        "aten",
        "prims",
        "prim",
        "mkldnn",
        "mkl",
        "quantized",
        "_quantized",
        "inductor",
        "higher_order",
        "c10d",
        "_c10d_functional",
        "rngprims",
        "profiler",
        "image",
        "torchvision",
    }
)


@dataclass(frozen=True)
class LiftedCall:
    """A call of a custom operator inside a piece: its operator, all its arguments, and which of them are lifted."""

    node: torch.fx.Node
    overload: Any
    arguments: tuple[Any, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class DescribedPiece:
    """A piece and its text.

    Attributes:
        piece: the nodes.
        text: JSON; equal where a compiler can't tell pieces apart. None where it can't be written down.
        symbols: the graph's symbols → those of the text, in order.
        lifted: calls with lifted arguments, in order.
        values: the lifted values, in order.
        why_not: why there is no text.
        is_storable: whether an artifact may outlive the process; not where code of a custom operator went into it.
    """

    piece: GraphPiece
    text: Mapping[str, Any] | None
    symbols: Mapping[str, str]
    lifted: tuple[LiftedCall, ...]
    values: tuple[str | int, ...]
    why_not: str = ""
    is_storable: bool = True

    def fingerprint(self) -> str | None:
        """Return the digest of the text."""
        return None if self.text is None else digest_json(self.text)


class _NoText(Exception):
    """Something in the piece can't be written down."""


def describe(piece: GraphPiece, *, lift: bool) -> DescribedPiece:
    """Write a piece down; with `lift`, without the strings and whole numbers that custom operators take."""
    writer = _Writer(lift=lift)
    try:
        text = writer.piece(piece)
        why = ""
    except _NoText as error:
        text, why = None, str(error)
    return DescribedPiece(
        piece,
        text,
        dict(writer.symbols),
        tuple(writer.lifted),
        tuple(writer.values),
        why,
        is_storable=not writer.has_foreign_code,
    )


@dataclass
class _Writer:
    lift: bool
    symbols: dict[str, str] = field(default_factory=dict)
    lifted: list[LiftedCall] = field(default_factory=list)
    values: list[str | int] = field(default_factory=list)
    numbers: dict[torch.fx.Node, int] = field(default_factory=dict)
    has_foreign_code: bool = False

    def piece(self, piece: GraphPiece) -> dict[str, Any]:
        storages: dict[int, int] = {}
        inputs = []
        for node in piece.inputs:
            self.numbers[node] = len(self.numbers)
            inputs.append([self.value(example(node)), self._alias(example(node), storages)])
        calls = [self.call(node) for node in piece.nodes]
        return {"inputs": inputs, "calls": calls, "outputs": [self.numbers[n] for n in piece.outputs]}

    def call(self, node: torch.fx.Node) -> list[Any]:
        overload = custom_overload(node) if node.op == "call_function" else None
        if overload is not None:
            written = self._custom(node, overload)
        elif node.op == "get_attr":
            written = ["body", self._body(_attribute(node))]
        else:
            target = node.target if node.op == "call_method" else self.function(node.target)
            written = [node.op, target, self.argument(node.args), self.argument(node.kwargs)]
        self.numbers[node] = len(self.numbers)
        return written

    def _custom(self, node: torch.fx.Node, overload: Any) -> list[Any]:
        """Write the call of a custom operator, with the shapes that came out of it."""
        self.has_foreign_code |= decomposes(overload)
        declared = operator_arguments(overload)
        given: list[Any] = list(node.args)
        for argument in declared[len(given) :]:
            if argument.name not in node.kwargs and not argument.has_default:
                raise _NoText(f"{overload} is called without {argument.name}")
            given.append(node.kwargs.get(argument.name, argument.default))
        positions = tuple(i for i, (a, v) in enumerate(zip(declared, given, strict=True)) if self._lifts(a.type, v))
        if positions:
            self.lifted.append(LiftedCall(node, overload, tuple(given), positions))
            self.values += [given[i] for i in positions]
        arguments = [{"lifted": type(v).__name__} if i in positions else self.argument(v) for i, v in enumerate(given)]
        return ["custom", str(overload), str(overload._schema), arguments, self.value(example(node))]

    def _lifts(self, declared: str, value: Any) -> bool:
        if not self.lift or type(value) not in (str, int):
            return False
        return declared in {"str", "int", "SymInt", "Optional[str]", "Optional[int]", "Optional[SymInt]"}

    def function(self, target: Any) -> str:
        name = function_name(target)
        if name is None:
            raise _NoText(f"it calls {target!r}, which is no function of torch")
        return name

    def argument(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return {"n": self.numbers[value]}
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return {"float": value.hex()}
        if isinstance(value, (list, tuple)):
            return [type(value).__name__, [self.argument(v) for v in value]]
        if isinstance(value, Mapping):
            return {"dict": [[self.argument(k), self.argument(v)] for k, v in value.items()]}
        if isinstance(value, slice):
            return {"slice": [self.argument(v) for v in (value.start, value.stop, value.step)]}
        if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format, complex, type(Ellipsis))):
            return {type(value).__name__: str(value)}
        if isinstance(value, Enum):
            return {"enum": f"{type(value).__module__}.{value}"}
        if isinstance(value, type) and value.__module__.split(".")[0] in {"torch", "builtins"}:
            return {"class": f"{value.__module__}.{value.__qualname__}"}
        raise _NoText(f"it has a {type(value).__name__} among its constants")

    def value(self, value: Any) -> Any:
        """Write what is known of a fake value: shape, strides, dtype, device."""
        if isinstance(value, torch.Tensor):
            if type(value).__name__ != "FakeTensor" and not isinstance(value, torch.nn.Parameter):
                raise _NoText(f"it has a {type(value).__name__} among its inputs")
            shape = [self._size(d) for d in value.shape]
            stride = [self._size(d) for d in value.stride()] if value.layout is torch.strided else []
            return [shape, stride, str(value.dtype), str(value.device), str(value.layout)]
        if isinstance(value, torch.SymInt):
            return {"size": self._size(value)}
        if value is None or type(value) in (bool, int):
            return value
        if isinstance(value, (tuple, list)):
            return [self.value(v) for v in value]
        if is_python_object(value):
            real = type(real_object(value))
            return {"object": f"{real.__module__}.{real.__qualname__}"}
        raise _NoText(f"it has a {type(value).__name__} among its inputs")

    def _size(self, value: int | torch.SymInt) -> int | str:
        if isinstance(value, int):
            return value
        text = str(value.node.expr)
        return int(text) if text.isdigit() else SYMBOL.sub(lambda m: self._symbol(m.group(0)), text)

    def _symbol(self, name: str) -> str:
        if not name.startswith("s"):
            raise _NoText(f"it has the size {name}, which depends on the values of a tensor")
        return self.symbols.setdefault(name, f"s{len(self.symbols)}")

    def _alias(self, value: Any, storages: dict[int, int]) -> int | None:
        """Number the memory that inputs share."""
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return None
        return storages.setdefault(storage_key(value), len(storages))

    def _body(self, module: Any) -> Any:
        """Write the body of a higher-order operator."""
        if not isinstance(module, torch.fx.GraphModule):
            raise _NoText(f"it holds a {type(module).__name__}")
        inner = _Writer(lift=False, symbols=self.symbols)
        lines: list[Any] = []
        for node in module.graph.nodes:
            if node.op == "placeholder":
                inner.numbers[node] = len(inner.numbers)
                lines.append(["input", inner.value(example(node))])
            elif node.op == "output":
                lines.append(["output", inner.argument(node.args)])
            else:
                lines.append(inner.call(node))
        return lines


def _attribute(node: torch.fx.Node) -> Any:
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def custom_overload(node: torch.fx.Node) -> Any:
    """Return the overload that a node calls where it is a custom operator (one that is not torch's own), else None."""
    overload = single_overload(node.target)
    return None if overload is None or overload.namespace in _OWN else overload


def runs_eagerly(piece: GraphPiece) -> str | None:
    """Say why a piece is better run operator by operator, or return None.

    Its inputs are given to the compiler as memory of their own, each from its start.
    """
    tensors = [v for v in map(example, piece.inputs) if isinstance(v, torch.Tensor) and v.layout is torch.strided]
    if any(_name(n) in _ABSOLUTE for n in piece.nodes) and any(not _is_zero(v.storage_offset()) for v in tensors):
        return "addresses memory of an input that begins elsewhere"
    seen = [storage_key(v) for v in tensors]
    if len(set(seen)) < len(seen) and any(_may_write(n) for n in piece.nodes):
        return "may write to memory that two of its inputs share"
    return None


_ABSOLUTE = frozenset({"as_strided", "as_strided_copy", "as_strided_scatter"})
_AUGMENTED = frozenset(n for n in dir(torch.Tensor) if n.startswith("__i") and n.endswith("__"))


def _is_zero(offset: int | torch.SymInt) -> bool:
    return isinstance(offset, int) and offset == 0


def _name(node: torch.fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))


def _may_write(node: torch.fx.Node) -> bool:
    """Whether a node may write to a tensor that it is given; better one time too often."""
    if node.op == "get_attr":
        return True  # the body of a higher-order operator
    overload = single_overload(node.target)
    if overload is not None:
        return bool(overload._schema.is_mutable)
    name = _name(node)
    named = name.endswith("_") and not name.endswith("__")
    augmented = name in {"setitem", "delitem"} or (name.startswith("i") and f"__{name}__" in _AUGMENTED)
    asked = any(v is True for v in (*node.args, node.kwargs.get("inplace"))) or node.kwargs.get("out") is not None
    return named or augmented or asked
