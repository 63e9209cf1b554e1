"""A piece as data: a straight-line program of operator calls over inputs and constants.

A program is everything that a backend gets to see of a piece. It holds no name of a node, weight or layer, so its
canonical JSON is both the text that the fingerprint digests and the text that a worker compiles from: nothing that is
not in the fingerprint can reach the generated code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from piecework.errors import InternalError
from piecework.foundation.digests import digest_json
from piecework.foundation.reading import MOST, fields, flag, items, mapping, one_of, text, whole

Dim = int | str
"""A size: a number, or an expression over the program's symbols such as "s0" or "s0 + 1"."""

DTYPES: Final = frozenset(
    {"bool", "bfloat16", "float16", "float32", "float64", "complex32", "complex64", "complex128"}
    | {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
    | {"float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"}
)
"""The element types of tensors that plans and programs may name."""

DEVICES: Final = frozenset({"cpu", "cuda"})
"""The device types that they may name."""

_TAGGED: Final[Mapping[str, frozenset[str]]] = {
    "dtype": DTYPES,
    "device": DEVICES,
    "layout": frozenset({"strided", "jagged", "_mkldnn", "sparse_coo", "sparse_csr", "sparse_csc"}),
    "memory_format": frozenset({"contiguous_format", "preserve_format", "channels_last", "channels_last_3d"}),
    "float": frozenset({"nan", "inf", "-inf"}),
}
_MOST_NESTED: Final = 8
_FIELDS: Final = ("symbols", "inputs", "constants", "calls", "outputs")


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
    def from_json(data: object) -> TensorSpec:
        """Read what `to_json` wrote. Raises ValueError where it is something else."""
        shape, stride, dtype, device, aligned = items(data, "a tensor", length=5)
        rank = len(items(shape, "a tensor's shape", most=64))
        return TensorSpec(
            tuple(_dim(d) for d in shape),
            tuple(_dim(d) for d in items(stride, "a tensor's strides", length=rank)),
            one_of(dtype, "a tensor's dtype", DTYPES),
            one_of(device, "a tensor's device", DEVICES),
            flag(aligned, "a tensor's alignment"),
        )


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
    def from_json(given: object) -> Program:
        """Read what `to_json` wrote. Raises ValueError for anything else, calls that read later ones included."""
        beside = mapping(given, "a program")  # what explains a program is written beside what it is
        data = fields(given, "a program", required=_FIELDS, optional=beside)
        inputs = tuple(TensorSpec.from_json(t) for t in items(data["inputs"], "a program's inputs"))
        constants = tuple(TensorSpec.from_json(t) for t in items(data["constants"], "a program's constants"))
        known = {"n": 0, "i": len(inputs), "c": len(constants)}
        calls = []
        for call in items(data["calls"], "a program's calls"):
            target, args, kwargs = items(call, "a call", length=3)
            for argument in items(args, "a call's arguments"):
                _check_encoded(argument, known)
            for name, argument in mapping(kwargs, "a call's arguments by name").items():
                text(name, "an argument")
                _check_encoded(argument, known)
            calls.append(Call(text(target, "a call's operator"), tuple(args), kwargs))
            known["n"] += 1
        outputs = items(data["outputs"], "a program's outputs")
        for output in outputs:
            _check_encoded(output, known)
        return Program(read_symbols(data["symbols"]), inputs, constants, tuple(calls), tuple(outputs))

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the program's structure."""
        return digest_json(self.to_json())


def read_symbols(given: object) -> tuple[tuple[str, int, int], ...]:
    """Read sizes with their ranges. Raises ValueError where they are something else."""
    found = []
    for symbol in items(given, "sizes", most=1024):
        name, low, high = items(symbol, "a size", length=3)
        least = whole(low, "a size's range")
        found.append((text(name, "a size", most=64), least, whole(high, "a size's range", least=least)))
    if len({name for name, _, _ in found}) != len(found):
        raise ValueError("two sizes of one name")
    return tuple(found)


def check_constant(value: object) -> None:
    """Raise ValueError for anything but a number that torch takes, a text, a truth value, or None."""
    if type(value) is float and math.isfinite(value):
        return
    if value is not None and type(value) is not bool:
        text(value, "a constant", empty=True, most=1 << 16) if type(value) is str else whole(
            value, "a constant", least=-MOST - 1
        )


def check_tagged(value: Mapping[str, Any]) -> None:
    """Raise ValueError for anything but a float, dtype, device, layout or memory format as programs write them."""
    ((tag, name),) = value.items()
    one_of(name, tag, _TAGGED.get(tag, frozenset()))


def _check_encoded(value: Any, known: Mapping[str, int], depth: int = 0) -> None:
    """Check an argument of a call; `known` counts calls, inputs and constants that are there before it."""
    if depth > _MOST_NESTED:
        raise ValueError("arguments in more than 8 levels")
    if type(value) is list:
        for item in items(value, "an argument"):
            _check_encoded(item, known, depth + 1)
    elif type(value) is dict:
        if len(value) != 1:
            raise ValueError(f"an argument with {len(value)} keys")
        ((kind, index),) = value.items()
        if kind in known:
            whole(index, f"a reference {kind!r}", most=known[kind] - 1)
        else:
            check_tagged(value)
    else:
        check_constant(value)


def _dim(value: object) -> Dim:
    return whole(value, "a size", least=-MOST) if type(value) is int else text(value, "a size", most=1024)


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
