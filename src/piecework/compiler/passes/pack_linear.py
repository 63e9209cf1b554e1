"""Linear layers whose weight is a constant become oneDNN's, so that the weight may be bound packed.

before: piecework::linear(x, w, b)        with w a constant of the piece that nothing else uses
after:  mkldnn::_linear_pointwise(x, w, b, "none", [], "")

Applies on x86 CPUs, for float32 and bfloat16 weights of two dimensions. The library takes the weight plain or packed;
the plan's recipe says that it is packed once, at load (DESIGN.md 4.7).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from piecework.ops.ir.program import Call, Program, references

LINEAR = "piecework.linear.default"
_PLAIN = "aten.linear.default"
_PACKED = "mkldnn._linear_pointwise.default"


def packable_constants(program: Program, *, dtypes: frozenset[str]) -> frozenset[int]:
    """Return the constants that are weights of linear layers and nothing else."""
    return frozenset(c for c in constants_used_as(LINEAR, program) if _fits(program, c, dtypes=dtypes))


def constants_used_as(target: str, program: Program, *, positions: Collection[int] = (1,)) -> frozenset[int]:
    """Return the constants that are arguments of calls of `target` at `positions`, the weight's, and nothing else."""
    weights: set[int] = set()
    others = {index for output in program.outputs for kind, index in references(output) if kind == "c"}
    for call in program.calls:
        for position, argument in enumerate(call.args):
            found = {index for kind, index in references(argument) if kind == "c"}
            (weights if call.target == target and position in positions else others).update(found)
        for argument in call.kwargs.values():
            others.update(index for kind, index in references(argument) if kind == "c")
    return frozenset(weights - others)


def _fits(program: Program, constant: int, *, dtypes: frozenset[str]) -> bool:
    spec = program.constants[constant]
    contiguous = len(spec.shape) == 2 and spec.stride == (spec.shape[1], 1)
    return spec.device == "cpu" and spec.dtype in dtypes and contiguous


def pack_linear(program: Program, *, constants: frozenset[int]) -> Program:
    """Put the linear layers whose weights are among `constants` on oneDNN's operator, the others on torch's own."""
    return replace(program, calls=tuple(_packed(c, constants) for c in program.calls))


def _packed(call: Call, constants: frozenset[int]) -> Call:
    if call.target != LINEAR:  # those with code of ours have it already (compiler/passes/native_matmul.py)
        return call
    weight = call.args[1]
    if not (isinstance(weight, Mapping) and weight.get("c") in constants):
        return Call(_PLAIN, call.args, call.kwargs)
    bias = call.args[2] if len(call.args) > 2 else call.kwargs.get("bias")
    return Call(_PACKED, (call.args[0], weight, bias, "none", [], ""), {})
