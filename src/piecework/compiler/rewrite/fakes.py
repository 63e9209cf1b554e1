"""A program's tensors without values: fake ones, whose sizes are symbolic over their declared ranges."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from piecework.compiler.encode import encode_torch_type
from piecework.foundation.torch_private import SymbolicSession, kernels_for_symbols, size_oblivious
from piecework.ops.ir.decode import decode
from piecework.ops.ir.program import Call, Program, TensorSpec, encode_float
from piecework.ops.ir.resolve import resolve_target

Symbols = Sequence[tuple[str, int, int]]


@dataclass(frozen=True)
class Sizes:
    """The sizes of one session, as a program names them.

    Attributes:
        session: where they live.
        fixed: those of which only one value is possible.
        hints: a typical value of each of the others.
    """

    session: SymbolicSession
    fixed: Mapping[str, int] = field(default_factory=dict)
    hints: Mapping[str, int] = field(default_factory=dict)

    def size(self, dim: int | str) -> Any:
        """Return a dimension as a number or a symbolic size."""
        if isinstance(dim, int):
            return dim
        for symbol, value in self.fixed.items():
            dim = re.sub(rf"\b{symbol}\b", str(value), dim)
        return self.session.expression(dim, hints=self.hints)

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """Return a fake tensor."""
        shape, stride = [self.size(d) for d in spec.shape], [self.size(d) for d in spec.stride]
        with self.session.fake_mode:
            return torch.empty_strided(shape, stride, dtype=getattr(torch, spec.dtype), device=spec.device)

    def spec(self, tensor: torch.Tensor) -> TensorSpec:
        """Return what describes a fake tensor of this session."""
        return TensorSpec(
            shape=tuple(self.text(d) for d in tensor.shape),
            stride=tuple(self.text(d) for d in tensor.stride()),
            dtype=str(tensor.dtype).removeprefix("torch."),
            device=tensor.device.type,
        )

    def text(self, size: Any) -> int | str:
        """Return a size as a program writes it: a number, or an expression over its symbols."""
        if isinstance(size, int):
            return size
        names = self.session.symbol_names()
        text = re.sub(r"\b[su]\d+\b", lambda m: names.get(m.group(0), m.group(0)), str(size.node.expr))
        return int(text) if text.isdigit() else text


def declare(
    symbols: Symbols, *, session: SymbolicSession, ranges: Mapping[str, tuple[int, int]] | None = None
) -> Sizes:
    """Declare a program's sizes in a session.

    Args:
        symbols: the program's.
        session: where they shall live; a range of one value gives a plain number.
        ranges: symbol → (min, max), where narrower than declared.
    """
    hints: dict[str, int] = {}
    fixed: dict[str, int] = {}
    for number, (symbol, declared_low, declared_high) in enumerate(symbols):
        low, high = (ranges or {}).get(symbol, (declared_low, declared_high))
        if low == high:
            fixed[symbol] = low
        else:
            hints[symbol] = _hint(low, high, number=number)
            session.size(symbol, low=low, high=high, hint=hints[symbol])
    return Sizes(session, fixed, hints)


def _hint(low: int, high: int, *, number: int) -> int:
    """Return a typical value: that of a small decode batch, different for each symbol."""
    typical = (32, 23, 41, 47, 53, 59, 61, 67)[number % 8]
    return max(low, min(high, typical))


@dataclass(frozen=True)
class FakeRun:
    """All values of a program, by the kind of reference to them: "n" calls' results, "i" inputs, "c" constants."""

    sizes: Sizes
    values: Mapping[str, Sequence[Any]]

    def decoded(self, value: Any) -> Any:
        """Return what an encoded argument stands for."""
        return decode(value, lambda kind, index: self.values[kind][index])

    def described(self, value: Any) -> Any:
        """Return what a signature has of an encoded argument: references as the specs of their tensors."""
        return _described(self.decoded(value), self.sizes)


def run_on_fakes(program: Program, *, known: Callable[[Call, FakeRun], Any] | None = None) -> FakeRun:
    """Run a program on fake tensors.

    Args:
        program: what.
        known: returns a call's result where it is known without running the call, else None.
    """
    sizes = declare(program.symbols, session=SymbolicSession())
    results: list[Any] = []
    run = FakeRun(
        sizes,
        {
            "n": results,
            "i": [sizes.tensor(spec) for spec in program.inputs],
            "c": [sizes.tensor(spec) for spec in program.constants],
        },
    )
    with torch.no_grad(), sizes.session.fake_mode, size_oblivious(), kernels_for_symbols():
        for call in program.calls:
            found = None if known is None else known(call, run)
            if found is None:
                args = [run.decoded(a) for a in call.args]
                kwargs = {name: run.decoded(value) for name, value in call.kwargs.items()}
                found = resolve_target(call.target)(*args, **kwargs)
            results.append(found)
    return run


def _described(value: Any, sizes: Sizes) -> Any:
    if isinstance(value, torch.Tensor):
        return {"tensor": sizes.spec(value).to_json()}
    if isinstance(value, torch.SymInt):
        return {"size": sizes.text(value)}
    if isinstance(value, (list, tuple)):
        return [_described(item, sizes) for item in value]
    if isinstance(value, float):
        return encode_float(value)
    return encode_torch_type(value) or value


def made_of(described: Any, sizes: Sizes) -> Any:
    """Return what `FakeRun.described` gave, in another session: tensors are new fake ones."""
    if isinstance(described, Mapping):
        if "tensor" in described:
            return sizes.tensor(TensorSpec.from_json(described["tensor"]))
        if "size" in described:
            return sizes.size(described["size"])
        return decode(described, _no_reference)
    return [made_of(item, sizes) for item in described] if isinstance(described, list) else described


def _no_reference(kind: str, index: int) -> Any:
    raise AssertionError(f"a reference {kind} {index} in a described argument")
