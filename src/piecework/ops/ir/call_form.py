"""The form of an IR op's call, as data: what a compiled body of the op is made for, and which calls it serves.

Whatever stays the same from call to call is written down: dtypes, devices, static sizes, layouts, numbers. Sizes that
differ have names and ranges.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from piecework.foundation.reading import fields, items, one_of, text, whole
from piecework.ops.ir.program import DEVICES, DTYPES, TensorSpec, check_constant, check_tagged, read_symbols

Size = int | str
"""A number, or the name of one of the form's dynamic sizes."""


@dataclass(frozen=True)
class TensorForm:
    """A tensor argument.

    Attributes:
        shape: its sizes.
        stride: for each axis a number of elements, or None where it is as if the axes behind it were packed: 1 for the
            last axis, else the size of the next axis times its stride. A contiguous tensor has None throughout.
        dtype: "bfloat16".
        device: its type, "cpu" or "cuda".
    """

    shape: tuple[Size, ...]
    stride: tuple[int | None, ...]
    dtype: str
    device: str

    def spec(self) -> TensorSpec:
        """Return what describes the tensor in a program whose symbols are the form's dynamic sizes."""
        strides: list[Size] = []
        packed: Size = 1
        for size, given in zip(reversed(self.shape), reversed(self.stride), strict=True):
            stride = packed if given is None else given
            strides.insert(0, stride)
            packed = _product(stride, size)
        packed_throughout = all(given is None for given in self.stride)
        return TensorSpec(self.shape, tuple(strides), self.dtype, self.device, aligned=packed_throughout)

    def text(self) -> str:
        """Return the tensor for people: "bfloat16[s0, 64]"."""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class CallForm:
    """A call.

    Attributes:
        op: the op, "namespace::name".
        arguments: for each of its parameters a TensorForm, or a constant as programs encode it (ops/ir/program.py).
        sizes: the dynamic sizes, each with its least and greatest value.
    """

    op: str
    arguments: tuple[Any, ...]
    sizes: tuple[tuple[str, int, int], ...] = ()

    def __hash__(self) -> int:
        return hash((self.text(), self.sizes))  # encoded constants may be mappings

    def text(self) -> str:
        """Return the call for people: "silu_mul(bfloat16[s0, 64], bfloat16[s0, 64])"."""
        given = ", ".join(a.text() if isinstance(a, TensorForm) else _shown(a) for a in self.arguments)
        return f"{self.op.removeprefix('piecework::')}({given})"

    def to_json(self) -> dict[str, Any]:
        """Return the form as JSON."""
        return {
            "op": self.op,
            "arguments": [
                {"tensor": [list(a.shape), list(a.stride), a.dtype, a.device]} if isinstance(a, TensorForm) else a
                for a in self.arguments
            ],
            "sizes": [list(size) for size in self.sizes],
        }

    @staticmethod
    def from_json(given: object) -> CallForm:
        """Read what `to_json` wrote. Raises ValueError where it is something else."""
        data = fields(given, "a call's form", required=("op", "arguments", "sizes"))
        sizes = read_symbols(data["sizes"])
        names = [name for name, _, _ in sizes]
        return CallForm(
            op=text(data["op"], "an op"),
            arguments=tuple(_argument(a, names) for a in items(data["arguments"], "arguments")),
            sizes=sizes,
        )


def _argument(given: Any, names: Collection[str]) -> Any:
    if type(given) is not dict:
        check_constant(given)
        return given
    if "tensor" not in given:
        check_tagged(given)
        return given
    shape, stride, dtype, device = items(given["tensor"], "a tensor", length=4)
    rank = len(items(shape, "a tensor's shape", most=64))
    return TensorForm(
        tuple(one_of(d, "a size", names) if type(d) is str else whole(d, "a size") for d in shape),
        tuple(None if s is None else whole(s, "a stride") for s in items(stride, "strides", length=rank)),
        one_of(dtype, "a tensor's dtype", DTYPES),
        one_of(device, "a tensor's device", DEVICES),
    )


def _product(stride: Size, size: Size) -> Size:
    if isinstance(stride, int) and isinstance(size, int):
        return stride * size
    return size if stride == 1 else stride if size == 1 else f"{stride}*{size}"


def _shown(constant: Any) -> str:
    return str(next(iter(constant.values()))) if isinstance(constant, Mapping) else str(constant)
