"""Check that a pass left a piece's results as they were: shapes, types and, where it matters, strides.

Both programs run on tensors without values, with numbers in the place of their sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from piecework.ops.program import Program, TensorSpec
from piecework.ops.resolve import decode, resolve_target
from piecework.store.sizes import size_expression

_TYPICAL = (7, 5, 11, 3, 13)


def same_results(before: Program, after: Program, *, strict_outputs: frozenset[int]) -> str | None:
    """Return what differs, for people, or None where nothing does; sizes are tried at two values each.

    Args:
        before, after: the programs.
        strict_outputs: positions of results whose strides must be the same.
    """
    for round_ in range(2):
        sizes = {name: _size(low, high, n + round_) for n, (name, low, high) in enumerate(before.symbols)}
        try:
            old = _run(before, sizes)
            new = _run(after, sizes)
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            return str(error).splitlines()[0]
        for position, (a, b) in enumerate(zip(old, new, strict=True)):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"result {position} would be {b.dtype} {list(b.shape)} instead of {a.dtype} {list(a.shape)}"
            if position in strict_outputs and a.stride() != b.stride():
                return f"another piece reads result {position}, whose strides would be {b.stride()}"
    return None


def _size(low: int, high: int, number: int) -> int:
    return max(low, min(high, _TYPICAL[number % len(_TYPICAL)]))


def _run(program: Program, sizes: Mapping[str, int]) -> list[torch.Tensor]:
    tables: dict[str, list[Any]] = {
        "n": [],
        "i": [_meta(spec, sizes) for spec in program.inputs],
        "c": [_meta(spec, sizes) for spec in program.constants],
    }

    def reference(kind: str, index: int) -> Any:
        return tables[kind][index]

    for call in program.calls:
        function = resolve_target(call.target)
        kwargs = {name: decode(value, reference) for name, value in call.kwargs.items()}
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        tables["n"].append(function(*(decode(argument, reference) for argument in call.args), **kwargs))
    return [decode(output, reference) for output in program.outputs]


def _meta(spec: TensorSpec, sizes: Mapping[str, int]) -> torch.Tensor:
    def value(dim: int | str) -> int:
        return dim if isinstance(dim, int) else size_expression(dim)(sizes)

    shape, stride = [value(d) for d in spec.shape], [value(d) for d in spec.stride]
    return torch.empty_strided(shape, stride, dtype=getattr(torch, spec.dtype), device="meta")
