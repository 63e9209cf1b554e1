"""Which quantized weights are packed, what the calls become, and that layers of one input are merged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from piecework.bundle.packings import LINEAR_COLUMNS
from piecework.bundle.run.eager import EagerRunner
from piecework.compiler.passes.native_matmul import native_matmul, plain_matmul
from piecework.compiler.passes.packing import Packing
from piecework.compiler.passes.pipeline import Pipeline
from piecework.ops.ir.program import Call, Program, TensorSpec, constant_name
from piecework.spec.passes import MERGE_LINEAR

_X = TensorSpec(("s0", 64), (64, 1), "bfloat16", "cpu")


def _spec(rows: int, columns: int, dtype: str) -> TensorSpec:
    return TensorSpec((rows, columns), (columns, 1), dtype, "cpu")


def _call(*constants: int | None) -> Call:
    given = [None if index is None else {"c": index} for index in constants]
    return Call("piecework.linear_quantized.default", ({"i": 0}, *given), {})


ONE = Program(
    (("s0", 1, 64),),
    (_X,),
    (_spec(64, 8, "int32"), _spec(64, 2, "float32"), _spec(64, 2, "float32")),
    (_call(0, 1, 2),),
    ({"n": 0},),
)


def test_a_weight_of_whole_blocks_is_packed_and_multiplied_natively() -> None:
    assert Packing(quantized=True).of(ONE) == dict.fromkeys(range(3), LINEAR_COLUMNS)
    assert Packing().of(ONE) == {}
    made = native_matmul(ONE, constants={0, 1, 2})
    (call,) = made.program.calls
    assert call.target == "piecework.linear_quantized_cpu.default"
    assert call.args == ({"i": 0}, {"c": 0}, {"c": 1}, {"c": 2}, None)
    assert made.source.startswith("#define PIECEWORK_QUANTIZED_INT4_BFLOAT16\n#include ")
    (names,) = made.options.values()
    assert list(names) == [torch.ops.piecework.linear_quantized_cpu.default]
    (unpacked,) = plain_matmul(ONE, constants={0, 1, 2}).calls
    assert unpacked.target == "piecework.linear_quantized_unpacked.default"


@pytest.mark.parametrize(
    "change",
    [
        {"constants": tuple(replace(spec, shape=(48, spec.shape[1])) for spec in ONE.constants)},
        {"constants": tuple(replace(spec, device="cuda") for spec in ONE.constants)},
        {"constants": (_spec(64, 8, "int32"), _spec(64, 16, "float32"), _spec(64, 16, "float32"))},
        {"calls": (_call(0, 1, 2), Call("aten.neg.default", ({"c": 1},), {}))},
        {"outputs": ({"n": 0}, {"c": 2})},
    ],
)
def test_others_are_widened_in_every_call(change: dict[str, Any]) -> None:
    program = replace(ONE, **change)
    assert Packing(quantized=True).of(program) == {}
    made = native_matmul(program, constants=())
    assert made.program.calls[0].target == "piecework.linear_quantized_plain.default"
    assert made.source == ""


def test_layers_that_read_the_same_tensor_become_one() -> None:
    """Values, scales and biases are put one below the other; a layer with other groups stays alone."""
    specs = [
        *(_spec(32, 64, "int8"), _spec(32, 1, "float32"), TensorSpec((32,), (1,), "bfloat16", "cpu")),
        *(_spec(64, 64, "int8"), _spec(64, 1, "float32"), TensorSpec((64,), (1,), "bfloat16", "cpu")),
        *(_spec(32, 64, "int8"), _spec(32, 2, "float32"), TensorSpec((32,), (1,), "bfloat16", "cpu")),
    ]
    calls = (_call(0, 1, None, 2), _call(3, 4, None, 5), _call(6, 7, None, 8))
    program = Program(ONE.symbols, (_X,), tuple(specs), calls, ({"n": 0}, {"n": 1}, {"n": 2}))
    made = Pipeline([MERGE_LINEAR]).run(program).rewritten
    merged = [call for call in made.program.calls if call.target == "piecework.linear_quantized.default"]
    assert [made.program.constants[c].shape for c in range(3)] == [(96, 64), (96, 1), (96,)]
    assert (len(merged), made.constants) == (2, ((0, 3), (1, 4), (2, 5), (6,), (7,), (8,)))
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randint(-9, 9, spec.shape, generator=generator).to(getattr(torch, spec.dtype))  # type: ignore[arg-type]
        for spec in specs
    ]
    x = torch.randint(-9, 9, (5, 64), generator=generator).to(torch.bfloat16)
    results = []
    for which, constants in (
        (program, given),
        (made.program, [torch.cat([given[i] for i in m]) for m in made.constants]),
    ):
        runner = EagerRunner(which)
        runner.bind({constant_name(i): tensor for i, tensor in enumerate(constants)})
        results.append(runner.run([x]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
