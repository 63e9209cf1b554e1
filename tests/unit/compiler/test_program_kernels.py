"""What a program costs operator by operator."""

from __future__ import annotations

from typing import Any

import pytest

from piecework.bundle.sizes import size_expression
from piecework.compiler.program_kernels import native_kernels, program_kernels
from piecework.foundation.traffic import Kernel
from piecework.ops.ir.program import Call, Program, TensorSpec

X = TensorSpec(("s0", 16), (16, 1), "float32", "cpu")
IDS = TensorSpec(("s0",), (1,), "int64", "cpu")
W = TensorSpec((32, 16), (16, 1), "float32", "cpu")
SCALE = TensorSpec((16,), (1,), "float32", "cpu")


def program(*calls: Call, inputs: tuple[TensorSpec, ...] = (X,), constants: tuple[TensorSpec, ...] = ()) -> Program:
    return Program((("s0", 1, 64),), inputs, constants, calls, ({"n": len(calls) - 1},))


def call(target: str, *args: Any, **kwargs: Any) -> Call:
    return Call(target, args, kwargs)


def test_a_linear_layer_reads_its_weight_apart_from_the_rest() -> None:
    made = program_kernels(program(call("piecework.linear.default", {"i": 0}, {"c": 0}), constants=(W,)))
    assert made == (Kernel("piecework.linear", ((str(32 * 16 * 4),),), (("64*s0",),), (("128*s0",),)),)


@pytest.mark.parametrize(
    "free",
    [
        call("aten.view.default", {"i": 0}, [-1]),
        call("aten.transpose.int", {"i": 0}, 0, 1),
        call("aten.slice.Tensor", {"i": 0}, 1, 0, 8),
        call("aten.expand.default", {"i": 0}, [4, -1, 16]),
        call("aten.split.Tensor", {"i": 0}, 8, 1),
        call("aten.sym_size.int", {"i": 0}, 0),
        call("aten.empty.memory_format", [4, 16]),
    ],
)
def test_views_sizes_and_empty_tensors_are_free(free: Call) -> None:
    assert program_kernels(program(free, call("aten.relu.default", {"i": 0}))) == (
        Kernel("aten.relu", (), (("64*s0",),), (("64*s0",),)),
    )


def test_a_view_of_a_weight_is_a_weight() -> None:
    calls = call("aten.slice.Tensor", {"c": 0}, 0, 0, 4), call("aten.mul.Tensor", {"i": 0}, {"n": 0})
    (kernel,) = (
        program_kernels(program(*calls, inputs=(TensorSpec((4, 16), (16, 1), "float32", "cpu"),), constants=(W,))) or ()
    )
    assert (kernel.weights, kernel.reads) == (((str(4 * 16 * 4),),), ((str(4 * 16 * 4),),))


def test_a_tensor_counts_once_and_only_its_own_elements() -> None:
    same = program_kernels(program(call("aten.mul.Tensor", {"i": 0}, {"i": 0})))
    assert same == (Kernel("aten.mul.Tensor", (), (("64*s0",),), (("64*s0",),)),)
    wide = call("aten.expand.default", {"c": 0}, [7, 16])
    (kernel,) = program_kernels(program(wide, call("aten.clone.default", {"n": 0}), constants=(SCALE,))) or ()
    assert kernel.weights == (("64",),)


def test_a_lookup_reads_no_more_than_it_returns() -> None:
    made = program(call("aten.embedding.default", {"c": 0}, {"i": 0}), inputs=(IDS,), constants=(W,))
    assert program_kernels(made) == (Kernel("aten.embedding", (("64*s0", "2048"),), (("8*s0",),), (("64*s0",),)),)


def test_an_operator_in_place_writes_its_argument() -> None:
    (first, second) = (
        program_kernels(program(call("aten.clone.default", {"i": 0}), call("aten.relu_.default", {"n": 0}))) or ()
    )
    assert (second.name, second.reads, second.writes) == ("aten.relu_", first.reads, first.writes)


def test_an_ir_op_is_what_its_native_body_is_made_of() -> None:
    made = program(call("piecework.silu_mul.default", {"i": 0}, {"i": 1}), inputs=(X, X))
    assert [kernel.name for kernel in native_kernels(made) or ()] == ["aten.silu", "aten.mul.Tensor"]
    (alone,) = program_kernels(made) or ()
    assert (alone.name, len(alone.reads), len(alone.writes)) == ("piecework.silu_mul", 2, 1)


def test_what_cannot_be_run_on_fakes_is_not_known() -> None:
    wrong = program(call("aten.mm.default", {"i": 0}, {"i": 0}))
    assert program_kernels(wrong) is None
    assert native_kernels(wrong) is None


def test_products_of_sizes_and_sums() -> None:
    product = program(
        call("aten.mm.default", {"i": 0}, {"i": 1}), inputs=(X, TensorSpec((16, "s0"), ("s0", 1), "float32", "cpu"))
    )
    (kernel,) = program_kernels(product) or ()
    assert kernel.writes == (("4*s0*s0",),)
    # no number times sizes: measured symbolically
    joined = program(call("aten.cat.default", [{"i": 0}, {"c": 0}]), constants=(W,))
    (kernel,) = program_kernels(joined) or ()
    assert (kernel.weights, kernel.reads, kernel.writes) == ((("2048",),), (("64*s0",),), (("64*s0 + 2048",),))


@pytest.mark.parametrize("ranges", [((1, 64), (1, 64)), ((1, 2), (3, 4)), ((0, 1), (5, 5)), ((7, 7), (1, 4096))])
def test_any_range_gives_the_same(ranges: tuple[tuple[int, int], tuple[int, int]]) -> None:
    symbols = tuple((f"s{n}", low, high) for n, (low, high) in enumerate(ranges))
    given = TensorSpec(("s0", "s1", 16), ("16*s1", 16, 1), "float32", "cpu")
    calls = call("aten.transpose.int", {"i": 0}, 0, 1), call("aten.clone.default", {"n": 0})
    (kernel,) = program_kernels(Program(symbols, (given,), (), calls, ({"n": 1},))) or ()
    for first in ranges[0]:
        for second in ranges[1]:
            assert size_expression(kernel.reads[0][0])({"s0": first, "s1": second}) == 64 * first * second
