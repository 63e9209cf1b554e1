"""Which linear weights are packed, and what the pass makes of their layers."""

from __future__ import annotations

from dataclasses import replace

from piecework.compiler.passes.pack_linear import pack_linear, packable_constants
from piecework.ops.ir.program import Call, Program, TensorSpec

F32 = frozenset({"float32"})
_X = TensorSpec(("s0", 8), (8, 1), "float32", "cpu")
_W = TensorSpec((16, 8), (8, 1), "float32", "cpu")
_B = TensorSpec((16,), (1,), "float32", "cpu")
_LINEAR = Call("piecework.linear.default", ({"i": 0}, {"c": 0}, {"c": 1}), {})
PROGRAM = Program((("s0", 1, 64),), (_X,), (_W, _B), (_LINEAR,), ({"n": 0},))


def test_a_linear_weight_is_packed_and_its_bias_is_not() -> None:
    assert packable_constants(PROGRAM, dtypes=F32) == {0}
    (call,) = pack_linear(PROGRAM, constants=frozenset({0})).calls
    assert call == Call("mkldnn._linear_pointwise.default", ({"i": 0}, {"c": 0}, {"c": 1}, "none", [], ""), {})


def test_a_weight_that_something_else_reads_is_left_alone() -> None:
    lookup = Call("aten.embedding.default", ({"c": 0}, {"i": 0}), {})
    tied = replace(PROGRAM, calls=(_LINEAR, lookup))
    assert packable_constants(tied, dtypes=F32) == frozenset()


def test_other_dtypes_layouts_and_devices_are_left_alone() -> None:
    assert packable_constants(PROGRAM, dtypes=frozenset({"bfloat16"})) == frozenset()
    for weight in (replace(_W, stride=(1, 16)), replace(_W, device="cuda"), replace(_W, shape=(16, 8, 1))):
        assert packable_constants(replace(PROGRAM, constants=(weight, _B)), dtypes=F32) == frozenset()


def test_a_layer_that_is_not_packed_goes_to_torch() -> None:
    (call,) = pack_linear(PROGRAM, constants=frozenset()).calls
    assert call.target == "aten.linear.default"
    assert call.args == _LINEAR.args
