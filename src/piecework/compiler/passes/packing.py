"""Which constants of a piece are bound packed, and how."""

from __future__ import annotations

from dataclasses import dataclass

from piecework.bundle.packings import HEAD_COLUMNS, LINEAR_COLUMNS, MKLDNN_LINEAR
from piecework.compiler.passes.native_matmul import packable_matrices
from piecework.compiler.passes.native_quantized import packable_quantized
from piecework.compiler.passes.pack_linear import packable_constants
from piecework.ops.ir.program import Program
from piecework.ops.packed import can_be_packed


@dataclass(frozen=True)
class Packing:
    """What a backend takes packed.

    Attributes:
        onednn: dtypes of the weights of linear layers that are packed for oneDNN, where they aren't for code of ours.
        own: dtypes of those that are packed for code of ours, where their sizes fit.
        matrices: whether heads' matrices are packed for code of ours.
        quantized: whether quantized weights are.
    """

    onednn: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()
    matrices: bool = False
    quantized: bool = False

    def of(self, program: Program) -> dict[int, str]:
        """Return the name of the packing of each constant that has one."""
        made = {}
        for index in sorted(packable_constants(program, dtypes=self.onednn | self.own)):
            weight = program.constants[index]
            columns, rows = (int(size) for size in weight.shape)
            if weight.dtype in self.own and can_be_packed(rows, columns, weight.dtype):
                made[index] = LINEAR_COLUMNS
            elif weight.dtype in self.onednn:
                made[index] = MKLDNN_LINEAR
        if self.matrices:
            made.update(dict.fromkeys(sorted(packable_matrices(program)), HEAD_COLUMNS))
        if self.quantized:
            made.update(dict.fromkeys(sorted(packable_quantized(program)), LINEAR_COLUMNS))
        return made
