"""Which weights a compile's target takes packed."""

from __future__ import annotations

from piecework.compiler.options import BackendName, CompileOptions
from piecework.foundation.target import Target
from piecework.passes.packing import Packing


def packing_of(options: CompileOptions, *, target: Target, device: str) -> Packing:
    """Return what is packed for `target`."""
    if device != "cpu" or options.backend is not BackendName.AOTI:
        return Packing()
    return Packing(linear=_linear_dtypes(options, target=target), matrices=True)


def _linear_dtypes(options: CompileOptions, *, target: Target) -> frozenset[str]:
    """Return the weight dtypes that oneDNN's x86 kernels support packed, and gain from."""
    if options.pack_linear is False:
        return frozenset()
    if target.machine != "x86_64" or target.isa == "baseline":
        return frozenset()
    return frozenset({"float32", "bfloat16"} if target.isa != "avx2" else {"float32"})
