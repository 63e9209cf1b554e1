"""Which constants of a piece are bound packed, and how."""

from __future__ import annotations

from dataclasses import dataclass

from piecework.ops.program import Program
from piecework.passes.native_matmul import packable_matrices
from piecework.passes.pack_linear import packable_constants
from piecework.store.packings import HEAD_COLUMNS, MKLDNN_LINEAR


@dataclass(frozen=True)
class Packing:
    """What a backend takes packed.

    Attributes:
        linear: dtypes of the weights of linear layers that are packed for oneDNN.
        matrices: whether heads' matrices are packed for code of ours.
    """

    linear: frozenset[str] = frozenset()
    matrices: bool = False

    def of(self, program: Program) -> dict[int, str]:
        """Return the name of the packing of each constant that has one."""
        made = dict.fromkeys(sorted(packable_constants(program, dtypes=self.linear)), MKLDNN_LINEAR)
        if self.matrices:
            made.update(dict.fromkeys(sorted(packable_matrices(program)), HEAD_COLUMNS))
        return made
