"""Run a benchmark as a CPU of a lesser level would: our code, torch's, oneDNN's and MKL's are limited to it.

python -m benchmarks.common.at_level avx2 benchmarks.linear --tokens 1,32
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Final

from piecework.foundation.environment import ISA_VARIABLE, child_variables

LEVELS: Final[Mapping[str, Mapping[str, str]]] = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512_bf16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}
"""What limits other libraries to a level; they read it when they are loaded."""


def main() -> None:
    """Become the module named, with its arguments, at a level."""
    level, module, *arguments = sys.argv[1:]
    variables = child_variables({ISA_VARIABLE: level, **LEVELS[level]})
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], variables)


if __name__ == "__main__":
    main()
