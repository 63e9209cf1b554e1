"""Which products of heads are done by code of ours, and what the pass makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from piecework.bundle.packings import HEAD_COLUMNS
from piecework.compiler.job import Job
from piecework.compiler.passes.native_matmul import native_matmul, native_sources, packable_matrices, plain_matmul
from piecework.compiler.passes.packing import Packing
from piecework.foundation.digests import digest_json
from piecework.ops.head_matmul import head_matmul, head_matmul_native
from piecework.ops.ir.program import Call, Program, TensorSpec
from piecework.ops.packed import packed_linear, packed_matrices, unpacked_linear, unpacked_matrices

_X = TensorSpec(("s0", 4, 8), (32, 8, 1), "float32", "cpu")
_W = TensorSpec((4, 8, 64), (512, 64, 1), "float32", "cpu")
_PRODUCT = Call("piecework.head_matmul.default", ({"i": 0}, {"c": 0}), {})
PROGRAM = Program((("s0", 0, 64),), (_X,), (_W,), (_PRODUCT,), ({"n": 0},))
PLAIN = "piecework.head_matmul_plain.default"


def test_a_constant_of_whole_blocks_is_packed_and_multiplied_natively() -> None:
    assert Packing(matrices=True).of(PROGRAM) == {0: HEAD_COLUMNS}
    assert Packing().of(PROGRAM) == {}
    made = native_matmul(PROGRAM, constants={0})
    assert [call.target for call in made.program.calls] == ["piecework.head_matmul_cpu.default"]
    assert made.program.calls[0].args == _PRODUCT.args
    assert made.source.startswith("#define PIECEWORK_FLOAT32\n#include ")
    (names,) = made.options.values()
    assert list(names) == [torch.ops.piecework.head_matmul_cpu.default]


@pytest.mark.parametrize(
    "weight",
    [
        replace(_W, device="cuda"),
        replace(_W, dtype="float64"),
        replace(_W, stride=(512, 1, 8)),
        replace(_W, shape=(4, 8, 48), stride=(384, 48, 1)),
        replace(_W, shape=(4, 7, 64), stride=(448, 64, 1)),
    ],
)
def test_others_are_torchs(weight: TensorSpec) -> None:
    program = replace(PROGRAM, constants=(weight,))
    assert packable_matrices(program) == frozenset()
    made = native_matmul(program, constants=())
    assert [call.target for call in made.program.calls] == [PLAIN]
    assert (made.source, made.options) == ("", {})


@pytest.mark.parametrize(
    "change",
    [
        {"calls": (_PRODUCT, Call("aten.neg.default", ({"c": 0},), {}))},
        {"outputs": ({"n": 0}, {"c": 0})},
    ],
)
def test_a_matrix_that_something_else_reads_stays_as_it_is(change: dict[str, Any]) -> None:
    assert packable_matrices(replace(PROGRAM, **change)) == frozenset()


def test_a_matrix_that_differs_from_call_to_call_is_torchs() -> None:
    given = replace(PROGRAM, inputs=(_X, _W), constants=(), calls=(replace(_PRODUCT, args=({"i": 0}, {"i": 1})),))
    assert packable_matrices(given) == frozenset()
    assert [call.target for call in native_matmul(given, constants=()).program.calls] == [PLAIN]


def test_all_can_be_torchs() -> None:
    assert [call.target for call in plain_matmul(PROGRAM, constants=()).calls] == [PLAIN]
    (unpacked,) = plain_matmul(PROGRAM, constants={0}).calls
    assert unpacked.target == "piecework.head_matmul_unpacked.default"


def test_a_piece_is_compiled_again_when_the_code_changes() -> None:
    assert {"products.h", "products_shim.h", "quantized.h", "quantized_shim.h", "lanes.h"} <= set(native_sources())
    native, plain = Job(PROGRAM, pack={0: HEAD_COLUMNS}), Job(PROGRAM)
    assert native.key() != digest_json(native.to_json())
    assert plain.key() == digest_json(plain.to_json())  # it has none of that code
    assert Job.from_json(native.to_json()) == native


def test_the_operator_is_torchs_bmm_with_tokens_first() -> None:
    x, weight = torch.randn(5, 3, 7).transpose(0, 1)[:, :, :6], torch.randn(5, 6, 4)
    made = head_matmul(x, weight)
    assert made.is_contiguous()
    torch.testing.assert_close(made, torch.einsum("thk,hkw->thw", x, weight))
    for other in (torch.ops.piecework.head_matmul_plain, head_matmul_native):
        torch.testing.assert_close(other(x, weight), made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_matrices_are_blocks_of_columns(dtype: torch.dtype) -> None:
    weight = torch.arange(2 * 4 * 64).reshape(2, 4, 64).to(dtype)
    packed = packed_matrices(weight)
    assert packed.shape == weight.shape
    block = packed.flatten()[2 * 4 * 32 : 3 * 4 * 32]  # of the second head, its first 32 columns
    columns = weight[1, :, :32]
    expected = columns.flatten() if dtype is torch.float32 else columns.unflatten(0, (2, 2)).transpose(1, 2).flatten()
    assert block.equal(expected)
    assert unpacked_matrices(packed).equal(weight)
    x = torch.randn(3, 2, 4).to(dtype)
    for name in ("head_matmul_cpu", "head_matmul_unpacked"):
        assert getattr(torch.ops.piecework, name)(x, packed).equal(head_matmul(x, weight))


def test_linear_layers_with_packed_weights_are_native_too() -> None:
    x = TensorSpec(("s0", 8), (8, 1), "bfloat16", "cpu")
    weight = TensorSpec((64, 8), (8, 1), "bfloat16", "cpu")
    bias = TensorSpec((64,), (1,), "bfloat16", "cpu")
    given = [({"i": 0}, {"c": 0}), ({"i": 0}, {"c": 0}, {"c": 1}), ({"i": 0}, {"c": 2}, {"c": 1})]
    calls = tuple(Call("piecework.linear.default", args, {}) for args in given)
    calls += (Call("piecework.linear.default", given[0], {"bias": {"c": 1}}),)
    program = Program((("s0", 1, 64),), (x,), (weight, bias, weight), calls, ({"n": 0},))
    made = native_matmul(program, constants={0})
    names = [call.target.split(".")[1] for call in made.program.calls]
    assert names == ["linear_cpu", "linear_bias_cpu", "linear", "linear_bias_cpu"]
    assert [len(call.args) for call in made.program.calls] == [2, 3, 3, 3]
    assert "PIECEWORK_BFLOAT16" in made.source
    (shims,) = made.options.values()
    assert set(shims) == {torch.ops.piecework.linear_cpu.default, torch.ops.piecework.linear_bias_cpu.default}
    plain = [call.target.split(".")[1] for call in plain_matmul(program, constants={0}).calls]
    assert plain == ["linear_unpacked", "linear_unpacked", "linear", "linear_unpacked"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_is_that_of_its_matrix(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(64, 6).to(dtype), torch.randn(64).to(dtype)
    packed = packed_linear(weight)
    assert packed.flatten().equal(packed_matrices(weight.t().unsqueeze(0)).flatten())
    assert unpacked_linear(packed).equal(weight)
    x = torch.randn(2, 3, 6).to(dtype)
    wanted = torch.nn.functional.linear(x, weight, bias)
    assert torch.ops.piecework.linear_bias_cpu(x, packed, bias).equal(wanted)
    assert torch.ops.piecework.linear_unpacked(x, packed, bias).equal(wanted)
    assert torch.ops.piecework.linear_cpu(x, packed).equal(torch.nn.functional.linear(x, weight))
