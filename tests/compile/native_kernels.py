"""Native kernels built for tests: for this machine, and for lesser ones that it can stand in for."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from piecework.compiler.backends.toolchain import KERNEL_FLAGS, find_toolchain
from piecework.foundation.target import read_target

_NEEDS = {"x86-64-v4": "avx512f", "x86-64-v3": "avx2", "x86-64": ""} if platform.machine() == "x86_64" else {}
MACHINES = ["native", *(pytest.param(m, marks=pytest.mark.slow) for m in _NEEDS)]


def build(main: Path, dtypes: Sequence[str], machine: str, directory: Path) -> Path:
    """Build a C++ file for some types; skips the test where this CPU lacks what the machine has."""
    toolchain = find_toolchain(directory, compiler=None)
    library = directory / "kernel.so"
    macros = tuple(f"PIECEWORK_{d.upper()}" for d in dtypes)
    if machine == "native":
        toolchain.compile_kernel(main, macros=macros, target=library)
        return library
    if _NEEDS[machine] and _NEEDS[machine] not in read_target().flags:
        pytest.skip(f"this CPU is no {machine}")
    flags = [f if f != "-march=native" else f"-march={machine}" for f in KERNEL_FLAGS]
    defines = [f"-D{m}" for m in macros]
    command = [toolchain.compiler, "-fPIC", *flags, *defines, str(main), "-o", str(library)]
    subprocess.run(command, check=True)
    return library
