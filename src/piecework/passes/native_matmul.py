"""Products of heads with matrices of their own are done by code of ours where that is made for them.

before: piecework::head_matmul(x, w)
after:  piecework::head_matmul_cpu(x, w)     a function of providers/cpu_pieces, compiled into the piece
or:     piecework::head_matmul_plain(x, w)   torch's bmm

Applies on CPUs to float32 and bfloat16 where w is a constant of even depth, whose width is whole blocks of columns. The
function itself leaves what the machine has no instructions for to torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from piecework.foundation.digests import digest_file
from piecework.ops.program import Call, Program
from piecework.providers import cpu_pieces

_PRODUCT: Final = "piecework.head_matmul.default"
_NATIVE: Final = "piecework.head_matmul_cpu.default"
_PLAIN: Final = "piecework.head_matmul_plain.default"
_DECLARED: Final = (
    "AOTITorchError aoti_torch_cpu_head_matmul_cpu(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*)"
)
_BLOCK: Final = 32  # columns; a multiple of what any machine takes at once
_DTYPES: Final = ("float32", "bfloat16")


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


def native_matmul(program: Program) -> NativeProducts:
    """Have products done natively where that is possible, and by torch elsewhere."""
    found = {_dtype(program, call) for call in program.calls if _fits(program, call)}
    made = replace(program, calls=tuple(_renamed(c, _NATIVE if _fits(program, c) else _PLAIN) for c in program.calls))
    if not found:
        return NativeProducts(made, "", {})
    shim = Path(cpu_pieces.__file__).resolve().parent / "head_matmul_shim.h"
    lines = [*(f"#define PIECEWORK_{dtype.upper()}" for dtype in sorted(found)), f'#include "{shim}"', ""]
    shims = {torch.ops.piecework.head_matmul_cpu.default: [_DECLARED]}
    return NativeProducts(made, "\n".join(lines), {"aot_inductor.custom_ops_to_c_shims": shims})


def plain_matmul(program: Program) -> Program:
    """Have all products done by torch."""
    return replace(program, calls=tuple(_renamed(call, _PLAIN) for call in program.calls))


def native_paths(program: Program) -> tuple[Path, ...]:
    """Return the files that are compiled into a program's piece besides its own code."""
    if not any(_fits(program, call) for call in program.calls):
        return ()
    own = Path(cpu_pieces.__file__).resolve().parent
    shared = own.parent / "cpu_common"
    return tuple(sorted([*own.glob("*.h"), shared / "elements.h", shared / "vectors.h"]))


def native_sources(program: Program) -> dict[str, str]:
    """Return the digests of `native_paths`, by name."""
    return {path.name: digest_file(path) for path in native_paths(program)}


def _renamed(call: Call, target: str) -> Call:
    return replace(call, target=target) if call.target == _PRODUCT else call


def _fits(program: Program, call: Call) -> bool:
    if call.target != _PRODUCT or "c" not in call.args[1]:
        return False
    weight = program.constants[call.args[1]["c"]]
    _, depth, width = (int(size) for size in weight.shape)
    contiguous = weight.stride == (depth * width, width, 1)
    return weight.device == "cpu" and weight.dtype in _DTYPES and contiguous and not depth % 2 and not width % _BLOCK


def _dtype(program: Program, call: Call) -> str:
    weight: int = call.args[1]["c"]
    return program.constants[weight].dtype
