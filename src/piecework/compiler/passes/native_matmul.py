"""Products with packed matrices are done by code of ours, compiled into the piece.

before: piecework::head_matmul(x, w)              before: piecework::linear(x, w, b)
after:  piecework::head_matmul_cpu(x, w)          after:  piecework::linear_bias_cpu(x, w, b), or linear_cpu(x, w)
or:     piecework::head_matmul_plain(x, w), which is torch's bmm

Both are functions of providers/cpu_pieces; quantized weights have one of their own (native_quantized.py). Applies to
constants that are bound packed, which the plan's recipes say (compiler/passes/packing.py); all other heads' products
are torch's, and other linear layers are left to compiler/passes/pack_linear.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from piecework.compiler.passes.native_quantized import (
    C_ARGUMENTS,
    QUANTIZED,
    definitions,
    with_native_quantized,
    with_plain_quantized,
)
from piecework.compiler.passes.pack_linear import LINEAR, constants_used_as
from piecework.foundation.digests import digest_file
from piecework.ops import head_matmul as _head_matmul  # noqa: F401  registers piecework::head_matmul_cpu
from piecework.ops import linear as _linear  # noqa: F401  registers piecework::linear_cpu
from piecework.ops.ir.program import Call, Program
from piecework.ops.packed import can_be_packed
from piecework.providers import cpu_pieces

_HEADS: Final = "piecework.head_matmul.default"
_SHARED: Final = ("elements", "fp8", "lanes", "products", "quantized", "quantized_amx", "vectors")
_HANDLE: Final = "AtenTensorHandle"
_PRODUCTS: Final = tuple(f"piecework.{name}.default" for name in ("head_matmul_cpu", "linear_cpu", "linear_bias_cpu"))


@dataclass(frozen=True)
class NativeProducts:
    """A program after the pass.

    Attributes:
        program: the program.
        source: C++ that must come before the piece's own, or "".
        options: for Inductor.
    """

    program: Program
    source: str
    options: dict[str, Any]


def packable_matrices(program: Program) -> frozenset[int]:
    """Return the constants that are heads' matrices and nothing else, and of which packed ones can be made."""
    return frozenset(c for c in constants_used_as(_HEADS, program) if _fits(program, c))


def native_matmul(program: Program, *, constants: Collection[int]) -> NativeProducts:
    """Have products with the matrices among `constants`, which are packed, done natively."""
    made = _with_targets(program, constants, heads="head_matmul_cpu", linear="linear_cpu", biased="linear_bias_cpu")
    made = _changed(made, QUANTIZED, lambda call: with_native_quantized(call, constants))
    if not constants:
        return NativeProducts(made, "", {})
    own = Path(cpu_pieces.__file__).resolve().parent
    of_products = {c["c"] for call in made.calls if call.target in _PRODUCTS for c in call.args[1:2]}
    found = sorted({program.constants[index].dtype for index in of_products.intersection(constants)})
    quantized = definitions(made)
    lines = [f"#define PIECEWORK_{dtype.upper()}" for dtype in found]
    lines += [f'#include "{own / "products_shim.h"}"'] if found else []
    lines += [*(f"#define {name}" for name in quantized), f'#include "{own / "quantized_shim.h"}"'] if quantized else []
    ops = torch.ops.piecework
    shims = {
        op.default: [f"AOTITorchError aoti_torch_cpu_{name}({', '.join([*given, _HANDLE])}*)"]
        for op, name, given in (
            (ops.head_matmul_cpu, "head_matmul_cpu", [_HANDLE] * 2),
            (ops.linear_cpu, "linear_cpu", [_HANDLE] * 2),
            (ops.linear_bias_cpu, "linear_bias_cpu", [_HANDLE] * 3),
            (ops.linear_quantized_cpu, "linear_quantized_cpu", C_ARGUMENTS),
        )
        if any(call.target == f"piecework.{name}.default" for call in made.calls)
    }
    return NativeProducts(made, "\n".join([*lines, ""]), {"aot_inductor.custom_ops_to_c_shims": shims})


def plain_matmul(program: Program, *, constants: Collection[int]) -> Program:
    """Have all products done by torch; the matrices among `constants`, which are packed, are unpacked every time."""
    linear = "linear_unpacked"
    made = _with_targets(program, constants, heads="head_matmul_unpacked", linear=linear, biased=linear)
    return _changed(made, QUANTIZED, lambda call: with_plain_quantized(call, constants))


def native_paths() -> tuple[Path, ...]:
    """Return the files that are compiled, besides its own code, into a piece with packed matrices."""
    own = Path(cpu_pieces.__file__).resolve().parent
    shared = own.parent / "cpu_common"
    return tuple(sorted([*own.glob("*.h"), *(shared / f"{n}.h" for n in _SHARED)]))


def native_sources() -> dict[str, str]:
    """Return the digests of `native_paths`, by name."""
    return {path.name: digest_file(path) for path in native_paths()}


def _with_targets(program: Program, constants: Collection[int], *, heads: str, linear: str, biased: str) -> Program:
    def changed(call: Call) -> Call:
        if call.target not in (_HEADS, LINEAR):
            return call
        packed = call.args[1].get("c") in constants
        if call.target == _HEADS:
            return _renamed(call, heads if packed else "head_matmul_plain")
        if not packed:
            return call
        bias = call.args[2] if len(call.args) > 2 else call.kwargs.get("bias")
        given = call.args[:2] if bias is None else (*call.args[:2], bias)
        return _renamed(replace(call, args=given, kwargs={}), linear if bias is None else biased)

    return replace(program, calls=tuple(changed(call) for call in program.calls))


def _changed(program: Program, target: str, change: Callable[[Call], Call]) -> Program:
    return replace(program, calls=tuple(change(call) if call.target == target else call for call in program.calls))


def _renamed(call: Call, name: str) -> Call:
    return replace(call, target=f"piecework.{name}.default")


def _fits(program: Program, constant: int) -> bool:
    weight = program.constants[constant]
    _, depth, width = (int(size) for size in weight.shape)
    contiguous = weight.stride == (depth * width, width, 1)
    return weight.device == "cpu" and contiguous and can_be_packed(depth, width, weight.dtype)
