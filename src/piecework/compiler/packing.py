"""Which weights a compile's target, and an opaque op, takes packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from piecework.compiler.passes.packing import Packing
from piecework.foundation.target import Target
from piecework.foundation.torch_private import operator_of, parameter_position
from piecework.ops.mla.operators import PACKABLE
from piecework.ops.packed import PACKED_DTYPES
from piecework.spec.compile_options import BackendName, CompileOptions

_OWN_LEVELS: Final = frozenset({"avx2", "avx512", "avx512_bf16"})


def packing_of(options: CompileOptions, *, target: Target, device: str) -> Packing:
    """Return what is packed for `target`.

    Unless it is asked for, linear layers have code of ours only where that was measured to be faster than oneDNN's
    (docs/decisions.md); dtypes that the CPU has matrix units (AMX) for are not among these.
    """
    if device != "cpu" or options.backend is not BackendName.AOTI:
        return Packing()
    asked = options.pack_linear
    onednn = _onednn_dtypes(target) if asked is not False else frozenset()
    own = _own_dtypes(target) if asked is None else frozenset(PACKED_DTYPES if asked == "own" else ())
    return Packing(onednn=onednn, own=own, matrices=True, quantized=True)


def _own_dtypes(target: Target) -> frozenset[str]:
    """Return the dtypes of weights that code of ours is faster with than oneDNN's."""
    if target.isa in _OWN_LEVELS:
        return frozenset(PACKED_DTYPES)
    without_units = target.isa == "amx_bf16" and "amx_fp16" not in target.flags
    return frozenset({"float16"} if without_units else ())


def _onednn_dtypes(target: Target) -> frozenset[str]:
    """Return the dtypes of weights that oneDNN's x86 kernels support packed, and gain from."""
    if target.machine != "x86_64" or target.isa == "baseline":
        return frozenset()
    return frozenset({"float32", "bfloat16"} if target.isa != "avx2" else {"float32"})


@dataclass(frozen=True)
class PackableArgument:
    """A weight that an opaque op takes packed as well, and the parameter that says whether it is."""

    weight: torch.fx.Node
    flag: str


def packable_argument(call: torch.fx.Node) -> PackableArgument | None:
    """Return what `call` of an opaque op takes packed, where a linear layer's packing is among what it reads."""
    operator = operator_of(call.target)
    if operator is None or operator.name not in PACKABLE:
        return None
    parameter, flag = PACKABLE[operator.name]
    position = parameter_position(call.target, parameter)
    given = call.args[position] if position < len(call.args) else call.kwargs[parameter]
    decided = flag in call.kwargs or parameter_position(call.target, flag) < len(call.args)
    return PackableArgument(given, flag) if isinstance(given, torch.fx.Node) and not decided else None
