"""Dynamo's graphs as something to capture: what torch.compile hands over is traced like any module's forward.

A placeholder that is a parameter or a buffer becomes a weight, any other tensor an input, and Dynamo's symbols become
declared sizes with the ranges that Dynamo knows. The trace is the one of every capture, so that a piece which both ways
produce is one piece. Where the trace holds for a part of a range only, the condition is put on Dynamo's own symbol:
Dynamo guards the frame by it and comes again for other sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from piecework.capture.capture import CapturedGraph, InputKind, capture
from piecework.capture.general import mentions
from piecework.capture.memory import kept_memory
from piecework.capture.request import CaptureRequest, Dim, SizeInput, TensorInput
from piecework.errors import CaptureError, ShapeContractError
from piecework.foundation.torch_private import (
    expression_text,
    holds,
    is_python_object,
    is_static_input,
    real_object,
    size_bounds,
)
from piecework.ops.ir.layer import LayerName

MOST: Final = (1 << 20, (1 << 31) - 1)
"""Greatest values that a size without a bound is compiled for: up to the first, or else up to the second."""
_MOST_TRACES: Final = 8


@dataclass(frozen=True)
class Given:
    """An input of the plan that is one of Dynamo's."""

    position: int


@dataclass(frozen=True)
class Carrier:
    """An input of the plan that is a tensor with the number at `position` as its size: pieces take tensors only."""

    position: int


@dataclass(frozen=True)
class Fixed:
    """An input of the plan that is an object which Dynamo's graph holds."""

    value: object


@dataclass(frozen=True)
class Computed:
    """A result of Dynamo's graph that is one of the captured graph's; `needs_grad` as it would have in eager mode."""

    position: int
    needs_grad: bool


@dataclass(frozen=True)
class SizeResult:
    """A result of Dynamo's graph that is computed from sizes."""

    expression: str


Result = Given | Fixed | Computed | SizeResult


@dataclass(frozen=True)
class DynamoGraph:
    """What a graph of Dynamo's is as a request, and how its inputs and results map to the captured graph's.

    Attributes:
        request: what is captured.
        inputs: the request's inputs and objects by name.
        weights: positions of the weights by name.
        results: of Dynamo's graph, in order.
        sizes: Dynamo's own sizes by name.
    """

    request: CaptureRequest
    inputs: Mapping[str, Given | Carrier | Fixed]
    weights: Mapping[str, int]
    results: tuple[Result, ...]
    sizes: Mapping[str, torch.SymInt]


def capture_dynamo(
    module: torch.fx.GraphModule, inputs: Sequence[Any], *, cut: frozenset[str]
) -> tuple[DynamoGraph, CapturedGraph]:
    """Trace a graph of Dynamo's, for the sizes that the frame will be guarded for.

    Args:
        module: from Dynamo, while it compiles the frame.
        inputs: what it gives for the placeholders.
        cut: further operators at which the graph is cut.

    Raises CaptureError where that can't be done.
    """
    written: frozenset[str] = frozenset()
    for _ in range(_MOST_TRACES):
        described = _Description(module, inputs, cut=cut, written=written).finish()
        try:
            captured = capture(described.request, templates=False)
        except ShapeContractError as error:
            _guard(error.conditions, described.sizes)
            continue
        kept = kept_memory(captured.graph, opaque=cut)
        changed = {i.name for i in captured.inputs if i.kind is InputKind.WEIGHT and i.node in kept}
        if not changed:
            return described, captured
        written |= changed
    raise _refused(f"each of {_MOST_TRACES} traces holds for other sizes")


def _guard(conditions: Sequence[str], sizes: Mapping[str, torch.SymInt]) -> None:
    """Let Dynamo guard the frame by conditions on its sizes, or by the sizes' values where those are no bounds."""
    for condition in conditions:
        involved = [size for name, size in sizes.items() if mentions(condition, name)]
        before = [size_bounds(size) for size in involved]
        if not holds(condition, {name: size for name, size in sizes.items() if mentions(condition, name)}):
            raise _refused(f"its trace relies on {condition}, which isn't so here")
        if [size_bounds(size) for size in involved] == before:
            for size in involved:
                int(size)


class _Description:
    """Reads Dynamo's graph."""

    def __init__(
        self, module: torch.fx.GraphModule, inputs: Sequence[Any], *, cut: frozenset[str], written: frozenset[str]
    ) -> None:
        self._module = module
        self._placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self._static = {n for n, given in zip(self._placeholders, inputs, strict=True) if is_static_input(n, given)}
        self._cut = cut
        self._written = written
        self._holder = nn.Module()
        self._dims: dict[str, Dim] = {}
        self._sizes: dict[str, torch.SymInt] = {}
        self._inputs: list[TensorInput | SizeInput] = []
        self._from: dict[str, Given | Carrier | Fixed] = {}
        self._weights: dict[str, int] = {}
        self._objects: dict[str, object] = {}
        self._examples: dict[str, object] = {}
        self._numbers: dict[str, int] = {}
        self._devices: set[str] = set()
        self._derived: set[str] = set()

    def finish(self) -> DynamoGraph:
        """Return the graph as a request. Raises CaptureError."""
        for position, node in enumerate(self._placeholders):
            self._placeholder(node, position)
        self._carry_numbers()
        unknown = sorted(self._derived - self._dims.keys())
        if unknown:
            raise _refused(f"it takes a tensor whose size is made of {unknown[0]}, which it doesn't take")
        if len(self._devices) > 1:
            raise _refused(f"it has tensors on {' and '.join(sorted(self._devices))}")
        results, leaves = self._results()
        request = CaptureRequest(
            module=self._holder,
            call=_Call(self._module, {**self._objects, **self._numbers}, leaves, self._floats()),
            inputs=tuple(self._inputs),
            sizes=self._dims,
            opaque=self._cut,
            device=next(iter(self._devices), "cpu"),
            objects={**self._objects, **self._held_objects()},
            examples=self._examples,
            may_write=True,
        )
        return DynamoGraph(request, self._from, self._weights, results, self._sizes)

    def _placeholder(self, node: torch.fx.Node, position: int) -> None:
        value = example(node)
        if isinstance(value, torch.Tensor):
            self._devices.add(value.device.type)
            shape = tuple(self._dim(d) for d in value.shape)
            if node in self._static and node.name not in self._written and all(isinstance(d, int) for d in shape):
                self._holder.register_buffer(node.name, torch.empty(shape, dtype=value.dtype, device="meta"))  # type: ignore[arg-type]
                self._weights[node.name] = position
                return
            self._inputs.append(_tensor_input(node.name, shape, value))
        elif isinstance(value, torch.SymInt):
            size = self._dim(value)
            if isinstance(size, int):  # Dynamo has given it a value since
                self._numbers[node.name] = size
                return
            if size not in self._dims:
                raise _refused(f"it takes the number {size}, which is computed of sizes")
            self._inputs.append(SizeInput(node.name, size))
        elif is_python_object(value):
            real = real_object(value)
            # equal names may differ at the next call, so what stands for them in the trace differs too
            self._objects[node.name] = LayerName(node.name) if isinstance(real, LayerName) else real
            self._examples[node.name] = real
        else:
            raise _refused(f"it takes a {type(value).__name__}")
        self._from[node.name] = Given(position)

    def _dim(self, size: int | torch.SymInt) -> int | str:
        """Return a size as requests have it; one that is new is declared. Raises CaptureError."""
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr.is_number:
            return int(expr)
        name = str(expr)
        if not expr.is_symbol:
            self._derived |= {str(symbol) for symbol in expr.free_symbols}
            return expression_text(expr, {symbol: symbol for symbol in self._derived})
        if name not in self._dims:
            self._sizes[name] = size
            self._dims[name] = _range(name, size)
        return name

    def _carry_numbers(self) -> None:
        """Give numbers that are no tensor's size a tensor that has them as one."""
        known = {d for i in self._inputs if isinstance(i, TensorInput) for d in i.shape}
        for given in [i for i in self._inputs if isinstance(i, SizeInput) and i.size not in known]:
            name = f"{given.name}_carrier"
            device = next(iter(self._devices), "cpu")
            self._inputs.append(TensorInput(name, (given.size,), "uint8", device, (0,)))
            source = self._from[given.name]
            assert isinstance(source, Given)
            self._from[name] = Carrier(source.position)

    def _floats(self) -> dict[torch.fx.Node, float | bool]:
        """Return the values of floating-point numbers; the frame is guarded by them.

        With `dynamic=True` Dynamo takes those that modules hold (a norm's epsilon) for inputs.
        """
        values = ((n, example(n)) for n in self._module.graph.nodes)
        kinds = {torch.SymFloat: float, torch.SymBool: bool}
        return {n: kinds[type(value)](value) for n, value in values if type(value) in kinds}

    def _held_objects(self) -> dict[str, object]:
        """Return the objects that are constants of the graph, as arguments of its operators."""
        held: dict[str, object] = {}
        for node in self._module.graph.nodes:
            for value in (*node.args, *node.kwargs.values()):
                if is_python_object(value) and not any(value is h for h in held.values()):
                    name = f"object_{len(held)}"
                    held[name] = value
                    self._from[name] = Fixed(value)
        return held

    def _results(self) -> tuple[tuple[Result, ...], tuple[int, ...]]:
        """Return what Dynamo's graph returns, and the positions of what is computed."""
        (output,) = (n for n in self._module.graph.nodes if n.op == "output")
        found: list[Result] = []
        leaves: list[int] = []
        for position, value in enumerate(output.args[0]):
            if not isinstance(value, torch.fx.Node):
                found.append(Fixed(value))
            elif value.op == "placeholder":
                found.append(Given(self._placeholders.index(value)))
            elif isinstance(made := example(value), torch.SymInt):
                found.append(SizeResult(self._text(made)))
            elif isinstance(made, torch.Tensor):
                found.append(Computed(len(leaves), made.requires_grad))
                leaves.append(position)
            else:
                raise _refused(f"it returns a {type(made).__name__}")
        return tuple(found), tuple(leaves)

    def _text(self, size: torch.SymInt) -> str:
        try:
            return expression_text(size.node.expr, {name: name for name in self._dims})
        except ValueError:
            raise _refused(f"it returns the size {size.node.expr}") from None


@dataclass(frozen=True)
class _Call:
    """Runs Dynamo's graph on named values, and on the holder's weights; returns the results in `leaves`.

    `numbers` are nodes whose values are known.
    """

    module: torch.fx.GraphModule
    fixed: Mapping[str, object]
    leaves: tuple[int, ...]
    numbers: Mapping[torch.fx.Node, float | bool]

    def __call__(self, holder: nn.Module, values: Mapping[str, Any]) -> list[torch.Tensor]:
        known = {**values, **self.fixed, **dict(holder.named_buffers())}
        order = [n.name for n in self.module.graph.nodes if n.op == "placeholder"]
        results = _Interpreter(self.module, self.numbers).run(*(known[name] for name in order))
        return [results[position] for position in self.leaves]


class _Interpreter(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, numbers: Mapping[torch.fx.Node, float | bool]) -> None:
        super().__init__(module)
        self._numbers = numbers

    def run_node(self, n: torch.fx.Node) -> Any:
        """See `torch.fx.Interpreter.run_node`."""
        return self._numbers[n] if n in self._numbers else super().run_node(n)


def example(node: torch.fx.Node) -> Any:
    """Return the fake value that Dynamo noted for a node, or None."""
    return node.meta.get("example_value")


def _tensor_input(name: str, shape: tuple[int | str, ...], value: torch.Tensor) -> TensorInput:
    fixed = all(isinstance(d, int) for d in (*shape, *value.stride()))
    return TensorInput(
        name=name,
        shape=shape,
        dtype=str(value.dtype).removeprefix("torch."),
        device=value.device.type,
        stride=tuple(value.stride()) if fixed else None,
    )


def _range(name: str, size: torch.SymInt) -> Dim:
    """Return the range of one of Dynamo's sizes; the frame is guarded by what Dynamo doesn't know yet."""
    low, high, hint = size_bounds(size)[name]
    if low < 0 and not holds(f"{name} >= 0", {name: size}):
        raise _refused("it takes a negative number that is no tensor's size")
    for most in MOST:
        if high <= most or holds(f"{name} <= {most}", {name: size}):
            return Dim(max(low, 0), min(high, most), hint=hint)
    raise _refused(f"it takes a size of {hint}")


def _refused(found: str) -> CaptureError:
    return CaptureError(asked="compile a graph of Dynamo's in pieces", found=found)
