"""Write graph nodes as a program: no names, symbols numbered in order of appearance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from piecework.capture.capture import CapturedGraph
from piecework.errors import CaptureError, InternalError
from piecework.foundation.torch_private import operator_name, operator_of
from piecework.ops.ir.program import Call, Program, TensorSpec, encode_float

_SYMBOL = re.compile(r"\b[su]\d+\b")
_SIZES_OF = frozenset({"aten::sym_size", "aten::sym_numel"})
_ARITHMETIC = {"Add": "operator.add", "Mul": "operator.mul", "FloorDiv": "operator.floordiv", "Mod": "operator.mod"}
"""What torch's expressions over sizes are made of, and the functions that compute it."""


class ProgramBuilder:
    """Collects the nodes of one piece into a Program."""

    def __init__(
        self,
        *,
        captured: CapturedGraph,
        weights: Mapping[torch.fx.Node, str],
        carriers: Mapping[str, torch.fx.Node],
    ) -> None:
        self.inputs: list[torch.fx.Node] = []
        self.constants: list[torch.fx.Node] = []
        self.origins: list[torch.fx.Node] = []  # the node that each call stands for
        self._captured = captured
        self._weights = weights
        self._carriers = carriers
        self._symbols: dict[str, str] = {}
        self._calls: list[Call] = []
        self._refs: dict[torch.fx.Node, dict[str, int]] = {}
        self._sizes: dict[str, dict[str, int]] = {}
        self._pending: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def call(self, node: torch.fx.Node) -> None:
        """Append one operator call."""
        if node.op != "call_function":
            raise InternalError(f"unexpected {node.op} {node.target} in a captured graph")
        args = tuple(self._encode(a) for a in node.args)
        kwargs = {k: self._encode(v) for k, v in node.kwargs.items()}
        self._refs[node] = self._append(node, target_name(node.target), args, kwargs)

    def finish(self, outputs: Sequence[torch.fx.Node]) -> Program:
        """Return the program with `outputs` as its results."""
        names = self._captured.size_names
        sizes = self._captured.request.traced_sizes
        self._carry_symbols()
        inputs = tuple(self._spec(n) for n in self.inputs)
        constants = tuple(self._spec(n) for n in self.constants)
        return Program(
            symbols=tuple((new, sizes[names[old]].min, sizes[names[old]].max) for old, new in self._symbols.items()),
            inputs=inputs,
            constants=constants,
            calls=tuple(self._calls),
            outputs=tuple(self._refs[n] for n in outputs),
        )

    def symbols(self) -> Mapping[str, str]:
        """Return the graph's symbols → the program's."""
        return self._symbols

    def _append(
        self, origin: torch.fx.Node, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, int]:
        self.origins.append(origin)
        self._calls.append(Call(target, args, kwargs))
        return {"n": len(self._calls) - 1}

    def _encode(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return self._reference(value)
        if isinstance(value, (list, tuple)):
            return [self._encode(v) for v in value]
        if isinstance(value, float):
            return encode_float(value)
        if value is None or isinstance(value, (bool, int, str)):
            return value
        encoded = encode_torch_type(value)
        if encoded is not None:
            return encoded
        raise CaptureError(
            asked="operators whose arguments are tensors, numbers, strings and torch's own types",
            found=f"an argument of type {type(value).__name__}: {value!r}"[:200],
            try_="make it a constant tensor of the module, or put the operator behind an opaque op",
        )

    def _reference(self, node: torch.fx.Node) -> Any:
        known = self._refs.get(node)
        if known is not None:
            return known
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return self._size(str(value.node.expr), node)
        if node in self._captured.views:
            self.call(node)
            return self._refs[node]
        if node in self._weights:
            self.constants.append(node)
            self._refs[node] = {"c": len(self.constants) - 1}
        elif isinstance(value, torch.Tensor):
            self._refs[node] = self._input(node)
        else:
            raise InternalError(f"a piece takes {node.target}, which is no tensor")
        return self._refs[node]

    def _input(self, node: torch.fx.Node) -> dict[str, int]:
        if node in self.inputs:
            return {"i": self.inputs.index(node)}
        self.inputs.append(node)
        return {"i": len(self.inputs) - 1}

    def _size(self, expr: str, node: torch.fx.Node) -> Any:
        """Return a reference to a call that computes the size `expr` inside this piece."""
        if expr in self._sizes:
            return self._sizes[expr]
        if _SYMBOL.fullmatch(expr):
            carrier, axis = self._carrier(expr)
            made = self._append(node, "aten.sym_size.int", (self._input_or_weight(carrier), axis), {})
        else:
            if node.op != "call_function":
                raise InternalError(f"the size {expr} is an input of its own")
            if operator_name(node.target) in _SIZES_OF and node.args[0] not in self._refs:
                computed = self._computed(node.meta["val"].node.expr, node)
                if computed is not None:
                    self._sizes[expr] = computed
                    return computed
            args = tuple(self._encode(a) for a in node.args)
            kwargs = {k: self._encode(v) for k, v in node.kwargs.items()}
            made = self._append(node, target_name(node.target), args, kwargs)
        self._sizes[expr] = made
        return made

    def _computed(self, expr: Any, node: torch.fx.Node) -> Any:
        """Return a reference to calls that compute a size from others, or None where it takes more than arithmetic.

        It is the size of a tensor that another piece makes, and need not hand over for that.
        """
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol:
            return self._size(str(expr), node)
        target = _ARITHMETIC.get(type(expr).__name__)
        parts = [self._computed(part, node) for part in expr.args] if target is not None else []
        if not parts or any(part is None for part in parts):
            return None
        made, *rest = parts
        for part in rest:
            made = self._append(node, str(target), (made, part), {})
        return made

    def _input_or_weight(self, node: torch.fx.Node) -> dict[str, int]:
        reference: dict[str, int] = self._reference(node)
        return reference

    def _carrier(self, symbol: str) -> tuple[torch.fx.Node, int]:
        """Return a tensor of this piece, or else an argument of the model, that has `symbol` as a size."""
        for node in [*self.inputs, *([self._carriers[symbol]] if symbol in self._carriers else [])]:
            for axis, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and str(size.node.expr) == symbol:
                    return node, axis
        raise CaptureError(
            asked="pieces whose sizes can be read from their tensors",
            found=f"the size {self._captured.size_names.get(symbol, symbol)!r} is computed with, and no tensor has it",
            try_="pass a tensor that has this size",
        )

    def _carry_symbols(self) -> None:
        """Make sure that each symbol of the inputs' shapes is some input's size by itself."""
        seen = 0
        while seen < len(self.inputs):
            value = self.inputs[seen].meta["val"]
            seen += 1
            for size in [*value.shape, *value.stride()]:
                if isinstance(size, torch.SymInt):
                    for symbol in _SYMBOL.findall(str(size.node.expr)):
                        self._input(self._carrier(symbol)[0])

    def _spec(self, node: torch.fx.Node) -> TensorSpec:
        value = node.meta["val"]
        offset = value.storage_offset()
        return TensorSpec(
            shape=tuple(self._dim(d) for d in value.shape),
            stride=tuple(self._dim(d) for d in value.stride()),
            dtype=str(value.dtype).removeprefix("torch."),
            device=value.device.type,
            aligned=isinstance(offset, int) and (offset * value.element_size()) % 64 == 0,
        )

    def _dim(self, value: Any) -> int | str:
        if isinstance(value, int):
            return value
        return _SYMBOL.sub(lambda m: self._symbol(m.group(0)), str(value.node.expr))

    def _symbol(self, name: str) -> str:
        return self._symbols.setdefault(name, f"s{len(self._symbols)}")


def encode_torch_type(value: object) -> dict[str, str] | None:
    """Return a dtype, device, layout or memory format as JSON, None for anything else."""
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    return None


def target_name(target: Any) -> str:
    """Return the name under which a program calls `target`: "aten.add.Tensor", "operator.mul", "torch.sym_max"."""
    if operator_of(target) is not None:
        return str(target)
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", "")
    if module in {"_operator", "operator"}:
        return f"operator.{name}"
    if module in {"math", "torch"}:
        return f"{module}.{name}"
    if module.startswith("torch.") and getattr(torch, name, None) is target:
        return f"torch.{name}"
    raise CaptureError(
        asked="a graph of registered operators", found=f"a call of {module}.{name}", try_="register it as an opaque op"
    )
