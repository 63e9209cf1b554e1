"""Products of heads with matrices of their own are done by code of ours where that is made for them.

before: piecework::head_matmul(x, w)
after:  piecework::head_matmul_cpu(x, w)     a function of providers/cpu_pieces, compiled into the piece
or:     piecework::head_matmul_plain(x, w)   torch's bmm

Applies to matrices that are bound packed: constants on CPUs, in float32 or bfloat16, of even depth and of whole blocks
of columns, that nothing else uses. The plan's recipe says that they are packed once, at load (DESIGN.md 4.7).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from piecework.foundation.digests import digest_file
from piecework.ops.head_matmul import BLOCK_COLUMNS
from piecework.ops.program import Call, Program
from piecework.passes.pack_linear import constants_used_as
from piecework.providers import cpu_pieces

_PRODUCT: Final = "piecework.head_matmul.default"
_NATIVE: Final = "piecework.head_matmul_cpu.default"
_PLAIN: Final = "piecework.head_matmul_plain.default"
_UNPACKED: Final = "piecework.head_matmul_unpacked.default"
_DECLARED: Final = (
    "AOTITorchError aoti_torch_cpu_head_matmul_cpu(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*)"
)
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


def packable_matrices(program: Program) -> frozenset[int]:
    """Return the constants that are heads' matrices and nothing else, and of which packed ones can be made."""
    return frozenset(c for c in constants_used_as(_PRODUCT, program) if _fits(program, c))


def native_matmul(program: Program, *, constants: Collection[int]) -> NativeProducts:
    """Have products with the matrices among `constants`, which are packed, done natively, and others by torch."""
    made = _renamed(program, constants, _NATIVE)
    if not constants:
        return NativeProducts(made, "", {})
    found = {program.constants[index].dtype for index in constants}
    shim = Path(cpu_pieces.__file__).resolve().parent / "head_matmul_shim.h"
    lines = [*(f"#define PIECEWORK_{dtype.upper()}" for dtype in sorted(found)), f'#include "{shim}"', ""]
    shims = {torch.ops.piecework.head_matmul_cpu.default: [_DECLARED]}
    return NativeProducts(made, "\n".join(lines), {"aot_inductor.custom_ops_to_c_shims": shims})


def plain_matmul(program: Program, *, constants: Collection[int]) -> Program:
    """Have all products done by torch; the matrices among `constants`, which are packed, are unpacked every time."""
    return _renamed(program, constants, _UNPACKED)


def native_paths() -> tuple[Path, ...]:
    """Return the files that are compiled, besides its own code, into a piece with packed matrices."""
    own = Path(cpu_pieces.__file__).resolve().parent
    shared = own.parent / "cpu_common"
    return tuple(sorted([*own.glob("*.h"), shared / "elements.h", shared / "vectors.h"]))


def native_sources() -> dict[str, str]:
    """Return the digests of `native_paths`, by name."""
    return {path.name: digest_file(path) for path in native_paths()}


def _renamed(program: Program, constants: Collection[int], packed: str) -> Program:
    def renamed(call: Call) -> Call:
        if call.target != _PRODUCT:
            return call
        return replace(call, target=packed if call.args[1].get("c") in constants else _PLAIN)

    return replace(program, calls=tuple(renamed(call) for call in program.calls))


def _fits(program: Program, constant: int) -> bool:
    weight = program.constants[constant]
    _, depth, width = (int(size) for size in weight.shape)
    contiguous = weight.stride == (depth * width, width, 1)
    return (
        weight.device == "cpu"
        and weight.dtype in _DTYPES
        and contiguous
        and not depth % 2
        and not width % BLOCK_COLUMNS
    )
