"""A program's values without contents, at sizes that are chosen: what passes know of shapes, and how they check.

It is far quicker than symbolic sizes (`compiler/rewrite/fakes.py`). What holds at a few sizes, the ends of their
ranges among them, is taken to hold at all: a program's shapes are sums and products of its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from piecework.bundle.sizes import size_expression
from piecework.foundation.torch_private import is_one, storage_key
from piecework.ops.ir.decode import decode
from piecework.ops.ir.program import Call, Program, TensorSpec
from piecework.ops.ir.resolve import resolve_target

_TYPICAL: Final = (7, 5, 11, 3, 13)
NUM_TYPICAL: Final = 2
"""How many different choices of typical sizes there are."""

ERRORS: Final = (RuntimeError, ValueError, NotImplementedError, TypeError, IndexError)
"""What an operator raises that a program calls with arguments which it can't have."""


@dataclass(frozen=True)
class MetaRun:
    """All values of a program at certain sizes, by the kind of reference to them: "n", "i" or "c"."""

    sizes: Mapping[str, int]
    values: Mapping[str, Sequence[Any]]

    def of(self, value: Any) -> Any:
        """Return what an encoded argument stands for."""
        return decode(value, lambda kind, index: self.values[kind][index])


Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def form(tensor: torch.Tensor) -> Form:
    """Return shape, strides (0 for axes of length 1, whose strides mean nothing) and dtype."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(tensor.shape), tuple(0 if is_one(size) else stride for size, stride in sizes), tensor.dtype


def place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common that are one and the same part of one memory."""
    return storage_key(tensor), tensor.storage_offset(), *form(tensor)


def typical_sizes(program: Program, choice: int) -> dict[str, int]:
    """Return sizes within their ranges, different for each symbol and for each of `NUM_TYPICAL` choices."""
    return {
        name: max(low, min(high, _TYPICAL[(number + choice) % len(_TYPICAL)]))
        for number, (name, low, high) in enumerate(program.symbols)
    }


def run_on_metas(program: Program, sizes: Mapping[str, int]) -> MetaRun:
    """Run a program at these sizes on tensors without contents. Raises one of `ERRORS` where that can't be."""
    values: dict[str, list[Any]] = {
        "n": [],
        "i": [empty(spec, sizes) for spec in program.inputs],
        "c": [empty(spec, sizes) for spec in program.constants],
    }
    for call in program.calls:
        values["n"].append(run_call(call, lambda kind, index: values[kind][index], device="meta"))
    return MetaRun(dict(sizes), values)


def run_call(call: Call, reference: Callable[[str, int], Any], *, device: str) -> Any:
    """Run one call; `reference(kind, index)` gives what its arguments refer to, on `device`."""
    kwargs = {name: decode(value, reference) for name, value in call.kwargs.items()}
    if "device" in kwargs:
        kwargs["device"] = torch.device(device)
    return resolve_target(call.target)(*(decode(argument, reference) for argument in call.args), **kwargs)


def empty(spec: TensorSpec, sizes: Mapping[str, int], *, device: str = "meta") -> torch.Tensor:
    """Return a tensor of a program's description."""

    def value(dim: int | str) -> int:
        return dim if isinstance(dim, int) else size_expression(dim)(sizes)

    shape, stride = [value(d) for d in spec.shape], [value(d) for d in spec.stride]
    return torch.empty_strided(shape, stride, dtype=getattr(torch, spec.dtype), device=device)
