"""Linear layers with quantized weights are done by code of ours, compiled into the piece.

before: piecework::linear_quantized(x, values, scales, offsets, bias)
after:  piecework::linear_quantized_cpu(x, values, scales, offsets, bias), of constants that are bound packed
or:     piecework::linear_quantized_plain(…), which widens the whole weight in every call

The function is one of providers/cpu_pieces/quantized_shim.h, compiled for the types of x and of values that the piece
has. compiler/passes/native_matmul.py, which this is a part of, says which constants are bound packed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Final

from piecework.compiler.passes.pack_linear import constants_used_as
from piecework.compiler.rewrite.metas import run_on_metas, typical_sizes
from piecework.ops import linear_quantized as _op  # noqa: F401  registers piecework::linear_quantized_cpu
from piecework.ops.ir.program import Call, Program
from piecework.ops.packed import BLOCK_COLUMNS

QUANTIZED: Final = "piecework.linear_quantized.default"
NATIVE: Final = "piecework.linear_quantized_cpu.default"
C_ARGUMENTS: Final = ("AtenTensorHandle",) * 3 + ("AtenTensorHandle*",) * 2
_PLAIN: Final = "piecework.linear_quantized_plain.default"
_UNPACKED: Final = "piecework.linear_quantized_unpacked.default"
_WEIGHT: Final = (1, 2, 3)
_PER_WORD: Final = {"int8": 4, "float8_e4m3fn": 4, "int32": 1}


def packable_quantized(program: Program) -> frozenset[int]:
    """Return the constants of quantized weights whose sizes fit: values, scales and offsets, all of a weight."""
    alone = constants_used_as(QUANTIZED, program, positions=_WEIGHT)
    calls = [call for call in program.calls if call.target == QUANTIZED]
    left = {c for call in calls if not _fits(program, call, alone) for c in _constants(call)}
    return frozenset(c for call in calls for c in _constants(call)) - left


def with_native_quantized(call: Call, constants: Collection[int]) -> Call:
    """Return what a call becomes where `constants` are bound packed."""
    return _renamed(call, NATIVE if set(_constants(call)) & set(constants) else _PLAIN)


def with_plain_quantized(call: Call, constants: Collection[int]) -> Call:
    """Return what a call becomes without code of ours."""
    return _renamed(call, _UNPACKED if set(_constants(call)) & set(constants) else _PLAIN)


def definitions(program: Program) -> tuple[str, ...]:
    """Return the macros that say which functions a program with native calls needs."""
    calls = [call for call in program.calls if call.target == NATIVE]
    if not calls:
        return ()
    run = run_on_metas(program, typical_sizes(program, 0))
    names = {"int8": "INT8", "int32": "INT4", "float8_e4m3fn": "FP8"}
    kinds = {names[program.constants[call.args[1]["c"]].dtype] for call in calls}
    found = {str(run.of(call.args[0]).dtype).removeprefix("torch.").upper() for call in calls}
    return tuple(sorted({f"PIECEWORK_QUANTIZED_{kind}_{dtype}" for kind in kinds for dtype in found}))


def _constants(call: Call) -> list[int]:
    """Return the constants of a call's weight; -1 where an argument is none."""
    given = [call.args[position] for position in _WEIGHT if position < len(call.args)]
    return [value.get("c", -1) for value in given if value is not None]


def _fits(program: Program, call: Call, alone: Collection[int]) -> bool:
    constants = _constants(call)
    if call.kwargs or not set(constants) <= set(alone):
        return False
    specs = [program.constants[index] for index in constants]
    contiguous = all(len(s.shape) == 2 and s.stride == (s.shape[1], 1) and s.device == "cpu" for s in specs)
    values, scales = specs[0], specs[1]
    rows, numbers, groups = (int(size) for size in (*values.shape, scales.shape[1]))
    per_word = _PER_WORD[values.dtype]
    return contiguous and rows % BLOCK_COLUMNS == 0 and numbers % (per_word * groups) == 0


def _renamed(call: Call, target: str) -> Call:
    padded = (*call.args, *[None] * (5 - len(call.args)))
    return replace(call, target=target, args=padded)
