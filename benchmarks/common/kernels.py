"""Kernels of ours by themselves, compiled as a bundle would have them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from piecework.compiler.backends.toolchain import find_toolchain

CACHE_BYTES: Final = 1 << 28  # of all layers of a case together, several times what the CPU's caches hold
_MACROS: Final = ("PIECEWORK_FLOAT32", "PIECEWORK_BFLOAT16")


def build_kernel(source: Path, directory: Path) -> Path:
    """Compile a kernel's source; return the library."""
    library = directory / f"{source.stem}.so"
    find_toolchain(directory, compiler=None).compile_kernel(source, macros=_MACROS, target=library)
    return library


def num_layers(bytes_of_one: int) -> int:
    """Return how many layers' caches a case cycles through, so that the cache is read from memory, as in a model."""
    return max(2, min(16, CACHE_BYTES // bytes_of_one))
