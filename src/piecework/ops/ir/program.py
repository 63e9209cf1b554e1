"""A piece as data: a straight-line program of operator calls over inputs and constants.

A program is everything that a backend gets to see of a piece. It holds no name of a node, weight or layer, so its
canonical JSON is both the text that the fingerprint digests and the text that a worker compiles from: nothing that is
not in the fingerprint can reach the generated code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from piecework.errors import InternalError
from piecework.foundation.digests import digest_json

Dim = int | str
"""A size: a number, or an expression over the program's symbols such as "s0" or "s0 + 1"."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape, stride (in elements), dtype ("float32") and device type ("cpu") of a tensor."""

    shape: tuple[Dim, ...]
    stride: tuple[Dim, ...]
    dtype: str
    device: str
    aligned: bool = True

    def to_json(self) -> list[Any]:
        """Return a compact JSON list."""
        return [list(self.shape), list(self.stride), self.dtype, self.device, self.aligned]

    @staticmethod
    def from_json(data: list[Any]) -> TensorSpec:
        """Read what `to_json` wrote."""
        shape, stride, dtype, device, aligned = data
        return TensorSpec(tuple(shape), tuple(stride), dtype, device, aligned)


@dataclass(frozen=True)
class Call:
    """One operator call. Arguments are JSON; {"n": i} is call i's result, {"i": i} an input, {"c": i} a constant."""

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Program:
    """The structure of one piece.

    Attributes:
        symbols: dynamic sizes in order of first appearance, each with its declared (min, max).
        inputs: tensors that differ from call to call.
        constants: tensors bound per instance (weights and buffers).
        calls: operators in execution order.
        outputs: references into calls (or inputs), in order.
    """

    symbols: tuple[tuple[str, int, int], ...]
    inputs: tuple[TensorSpec, ...]
    constants: tuple[TensorSpec, ...]
    calls: tuple[Call, ...]
    outputs: tuple[Any, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the program as JSON; equal programs give equal JSON."""
        return {
            "symbols": [list(s) for s in self.symbols],
            "inputs": [t.to_json() for t in self.inputs],
            "constants": [t.to_json() for t in self.constants],
            "calls": [[c.target, list(c.args), dict(c.kwargs)] for c in self.calls],
            "outputs": list(self.outputs),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Program:
        """Read what `to_json` wrote."""
        return Program(
            symbols=tuple((str(n), int(lo), int(hi)) for n, lo, hi in data["symbols"]),
            inputs=tuple(TensorSpec.from_json(t) for t in data["inputs"]),
            constants=tuple(TensorSpec.from_json(t) for t in data["constants"]),
            calls=tuple(Call(target, tuple(args), kwargs) for target, args, kwargs in data["calls"]),
            outputs=tuple(data["outputs"]),
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the program's structure."""
        return digest_json(self.to_json())


def constant_name(index: int) -> str:
    """Return the name under which an artifact knows its `index`-th constant."""
    return f"w{index}"


def references(value: Any) -> Iterator[tuple[str, int]]:
    """Yield every (kind, index) reference inside an encoded argument; kind is "n", "i" or "c"."""
    if isinstance(value, Mapping):
        for kind in ("n", "i", "c"):
            if kind in value:
                yield kind, value[kind]
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from references(item)


def encode_float(value: float) -> Any:
    """Encode a float so that JSON keeps it exactly, infinities and NaN included."""
    if value != value or value in (float("inf"), float("-inf")):
        return {"float": repr(value)}
    return value


def decode_scalar(value: Mapping[str, Any]) -> Any:
    """Decode a tagged scalar other than a torch type."""
    if "float" in value:
        return float(value["float"])
    raise InternalError(f"unknown tag in a program: {value}")
