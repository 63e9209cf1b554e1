"""The native kernels: which operators each of them is for, what it is built from, and how a built one is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from piecework.errors import BundleError
from piecework.ops.attention import ATTENTION_OP
from piecework.ops.layer_attention import LAYER_ATTENTION_OP, layered
from piecework.ops.mla.attention import MLA_ATTENTION_OP, whole_attention
from piecework.ops.mla.core import LatentCores
from piecework.ops.mla.operators import (
    MLA_DECODE_OP,
    MLA_PREFILL_OP,
    MLA_WRITE_DECODE_OP,
    MLA_WRITE_OP,
    row_view,
)
from piecework.providers.cpu_attention import kernel as cpu_attention
from piecework.providers.cpu_mla import calls as cpu_mla_calls
from piecework.providers.cpu_mla import kernel as cpu_mla


@dataclass(frozen=True)
class Kernel:
    """A native kernel.

    Attributes:
        name: which one; a bundle's plan says it.
        operators: what it implements, as "namespace::name".
        main: the C++ file to compile; what it includes lies beside it, or in `cpu_common`.
        dtypes: element types that it can be built for, each with a macro: PIECEWORK_FLOAT32 …
    """

    name: str
    operators: frozenset[str]
    main: Path
    dtypes: tuple[str, ...]

    @property
    def sources(self) -> tuple[Path, ...]:
        """Return the files that it is built from, sorted."""
        folders = (self.main.parent, self.main.parents[1] / "cpu_common")
        return tuple(sorted(p for f in folders for p in f.iterdir() if p.suffix in {".cpp", ".h"}))


CPU_ATTENTION: Final = Kernel(
    name="cpu_attention",
    operators=frozenset({ATTENTION_OP, LAYER_ATTENTION_OP}),
    main=cpu_attention.SOURCES / "attention.cpp",
    dtypes=cpu_attention.DTYPES,
)
CPU_MLA: Final = Kernel(
    name="cpu_mla",
    operators=frozenset({MLA_WRITE_OP, MLA_DECODE_OP, MLA_WRITE_DECODE_OP, MLA_PREFILL_OP, MLA_ATTENTION_OP}),
    main=cpu_mla.SOURCES / "mla.cpp",
    dtypes=cpu_mla_calls.DTYPES,
)
KERNELS: Final = (CPU_ATTENTION, CPU_MLA)


def open_kernel(name: str, library: Path) -> Mapping[str, Callable[..., Any]]:
    """Open a built kernel; returns its implementations of operators by "namespace::name".

    Raises BundleError where it can't be used here; then the operators' own implementations can.
    """
    try:
        if name == CPU_ATTENTION.name:
            attention = cpu_attention.CpuAttention(library)
            return {ATTENTION_OP: attention, LAYER_ATTENTION_OP: layered(attention, attention.attend)}
        if name == CPU_MLA.name:
            mla = cpu_mla.CpuMla(library)
            cores = LatentCores(mla.write, mla.decode, mla.write_decode, mla.prefill, row_view)
            return {
                MLA_WRITE_OP: mla.write,
                MLA_DECODE_OP: mla.decode,
                MLA_WRITE_DECODE_OP: mla.write_decode,
                MLA_PREFILL_OP: mla.prefill,
                MLA_ATTENTION_OP: whole_attention(cores),
            }
        found = "this piecework knows no kernel of that name"
    except (OSError, AttributeError) as error:
        found = str(error)
    raise BundleError(
        asked=f"open the kernel {name}", found=found, try_="compile the model again with this version of piecework"
    )
