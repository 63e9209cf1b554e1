"""Which weights a compile's target takes packed."""

from __future__ import annotations

from piecework.compiler.options import BackendName, CompileOptions
from piecework.foundation.target import Target
from piecework.passes.packing import Packing


def packing_of(options: CompileOptions, *, target: Target, device: str) -> Packing:
    """Return what is packed for `target`.

    Unless it is asked for, linear layers have code of ours only where that was measured to be faster than oneDNN's
    (docs/decisions.md); CPUs with matrix units (AMX) are not among these.
    """
    if device != "cpu" or options.backend is not BackendName.AOTI:
        return Packing()
    both = frozenset({"float32", "bfloat16"})
    asked = options.pack_linear
    own = both if asked == "own" or (asked is None and target.isa == "avx512_bf16") else frozenset()
    return Packing(onednn=_onednn_dtypes(target) if asked is not False else frozenset(), own=own, matrices=True)


def _onednn_dtypes(target: Target) -> frozenset[str]:
    """Return the dtypes of weights that oneDNN's x86 kernels support packed, and gain from."""
    if target.machine != "x86_64" or target.isa == "baseline":
        return frozenset()
    return frozenset({"float32", "bfloat16"} if target.isa != "avx2" else {"float32"})
