"""The first difference between two hand-made programs, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from piecework.ops.ir.program import Call, Program, TensorSpec
from piecework.report.differences import find_difference, first_difference
from piecework.report.listing import Listing, join_names
from piecework.report.parts import layer_of_call


def spec(*shape: int | str, dtype: str = "float32", **changes: Any) -> TensorSpec:
    stride = changes.pop("stride", tuple(range(len(shape), 0, -1)))
    return TensorSpec(shape, stride, dtype, changes.pop("device", "cpu"), **changes)


LINEAR = Call("piecework.linear.default", ({"i": 0}, {"c": 0}, None), {})
SILU = Call("aten.silu.default", ({"n": 0},), {})
SCALE = Call("aten.mul.Tensor", ({"n": 1}, 0.5), {})
LINES = ("pkg/model.py:10", "pkg/model.py:11", "pkg/model.py:12")


def program(*calls: Call, **changes: Any) -> Program:
    plain = {
        "symbols": (("s0", 1, 64),),
        "inputs": (spec("s0", 8),),
        "constants": (spec(16, 8),),
        "calls": calls or (LINEAR, SILU, SCALE),
        "outputs": ({"n": len(calls or (1, 2, 3)) - 1},),
    }
    return Program(**{**plain, **changes})


def listing(made: Program | None = None, **changes: Any) -> Listing:
    names = {"aten.mul.Tensor": ("self", "other"), "piecework.linear.default": ("x", "weight", "bias")}
    plain = {"program": made or program(), "locations": LINES, "names": ("layers.0.up",), "arguments": names}
    return Listing(**{**plain, "sizes": {"s0": "rows"}, "primary": "s0", **changes})


def text(other: Listing) -> str | None:
    found = find_difference(other, listing())
    return None if found is None else found.text


def test_equal_programs() -> None:
    assert text(listing()) is None
    assert text(listing(names=("layers.7.up",), locations=("other.py:1",) * 3)) is None, "names are no difference"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (
            program(LINEAR, Call("aten.gelu.default", ({"n": 0},), {}), SCALE),
            "call 2: aten.gelu against aten.silu at pkg/model.py:11",
        ),
        (
            program(LINEAR, SILU, Call("aten.mul.Tensor", ({"n": 1}, 0.25), {})),
            "constant 0.25 against 0.5 in argument 2 (other) of aten.mul.Tensor at pkg/model.py:12",
        ),
        (
            program(LINEAR, SILU, Call("aten.mul.Tensor", ({"n": 1}, {"float": "inf"}), {})),
            "constant inf against 0.5 in argument 2 (other) of aten.mul.Tensor at pkg/model.py:12",
        ),
        (
            program(LINEAR, SILU, Call("aten.mul.Tensor", ({"n": 0}, 0.5), {})),
            "call 3: argument 1 (self) of aten.mul.Tensor is the result of call 1 (piecework.linear) against the "
            "result of call 2 (aten.silu) at pkg/model.py:12",
        ),
        (
            program(LINEAR, SILU, Call("aten.mul.Tensor", ({"n": 1}, {"i": 0}), {})),
            "call 3: argument 2 (other) of aten.mul.Tensor is input 1 against 0.5 at pkg/model.py:12",
        ),
        (
            program(LINEAR, SILU, Call("aten.mul.Tensor", ({"n": 1},), {})),
            "call 3: argument 2 (other) of aten.mul.Tensor is not given against 0.5 at pkg/model.py:12",
        ),
        (
            program(LINEAR, SILU, Call("aten.mul.Tensor", ({"n": 1}, 0.5), {"out": {"dtype": "float32"}})),
            "call 3: argument out of aten.mul.Tensor is float32 against not given at pkg/model.py:12",
        ),
        (
            program(LINEAR, SILU),
            "different number of operators: 2 against 3; the first 2 are the same, then comes aten.mul.Tensor in the "
            "latter at pkg/model.py:12",
        ),
        (
            program(LINEAR, SILU, SCALE, SILU),
            "different number of operators: 4 against 3; the first 3 are the same, then comes aten.silu in the former",
        ),
        (
            program(SILU, SCALE),
            "different number of operators: 2 against 3; the first that differs is call 1: aten.silu against "
            "piecework.linear at pkg/model.py:10",
        ),
        (
            program(constants=(spec(32, 8),)),
            "shape [32, 8] against [16, 8] of constant w0 (layers.{3,0}.up) used by piecework.linear at "
            "pkg/model.py:10",
        ),
        (
            program(constants=(spec(16, 8, stride=(1, 16)),)),
            "stride [1, 16] against [2, 1] of constant w0 (layers.{3,0}.up) used by piecework.linear at "
            "pkg/model.py:10",
        ),
        (
            program(constants=(spec(16, 8, dtype="bfloat16"),)),
            "dtype bfloat16 against float32 of constant w0 (layers.{3,0}.up) used by piecework.linear at "
            "pkg/model.py:10",
        ),
        (
            program(constants=(spec(16, 8, aligned=False),)),
            "alignment to 64 bytes no against yes of constant w0 (layers.{3,0}.up) used by piecework.linear at "
            "pkg/model.py:10",
        ),
        (
            program(inputs=(spec("s0 + 1", 8),)),
            "shape [rows + 1, 8] against [rows, 8] of input 1 used by piecework.linear at pkg/model.py:10",
        ),
        (
            program(inputs=(spec("s0", 8, device="cuda"),)),
            "device cuda against cpu of input 1 used by piecework.linear at pkg/model.py:10",
        ),
        (program(outputs=({"n": 1}, {"n": 2})), "different number of results: 2 against 1"),
        (
            program(outputs=({"n": 1},)),
            "result 1 is the result of call 2 (aten.silu) against the result of call 3 (aten.mul.Tensor)",
        ),
        (program(inputs=(spec("s0", 8), spec(4))), "different number of inputs: 2 against 1"),
        (program(symbols=(("s0", 2, 64),)), "size rows is 2 to 64 against 1 to 64"),
    ],
)
def test_first_difference(other: Program, expected: str) -> None:
    assert text(listing(other, names=("layers.3.up",))) == expected


def test_the_name_that_a_library_bakes_in() -> None:
    def calling(name: str) -> Listing:
        call = Call("mylib.gated_delta_net.default", ({"i": 0}, name), {})
        names = {call.target: ("x", "layer")}
        return listing(program(call), locations=("mylib/model.py:123",), arguments=names)

    found = find_difference(calling("layers.0.gdn_in_proj"), calling("layers.1.gdn_in_proj"))
    assert found is not None
    assert found.text == (
        "constant 'layers.0.gdn_in_proj' against 'layers.1.gdn_in_proj' in argument 2 (layer) of "
        "mylib.gated_delta_net at mylib/model.py:123"
    )
    assert (found.call, found.locations) == (1, ("mylib/model.py:123", "mylib/model.py:123"))


def test_numbers_of_another_type_differ() -> None:
    made = program(LINEAR, SILU, Call("aten.mul.Tensor", ({"n": 1}, 1), {}))
    other = program(LINEAR, SILU, Call("aten.mul.Tensor", ({"n": 1}, 1.0), {}))
    found = find_difference(listing(made), listing(other))
    assert found is not None
    assert found.text.startswith("constant 1 against 1.0 in argument 2")
    zero, minus = (program(LINEAR, SILU, Call("aten.mul.Tensor", ({"n": 1}, x), {})) for x in (0.0, -0.0))
    found = find_difference(listing(zero), listing(minus))
    assert found is not None
    assert found.text.startswith("constant 0.0 against -0.0 in argument 2")


def test_lists_are_compared_item_by_item() -> None:
    made = program(Call("aten.cat.default", ([{"i": 0}, {"c": 0}], 1), {}))
    other = program(Call("aten.cat.default", ([{"i": 0}, {"i": 0}], 1), {}))
    found = find_difference(listing(made), listing(other))
    assert found is not None
    assert found.text == (
        "call 1: argument 1 of aten.cat is constant w0 (layers.0.up) against input 1 at pkg/model.py:10"
    )


def test_lists_of_another_length() -> None:
    made = program(Call("aten.view.default", ({"i": 0}, [1, -1]), {}))
    other = program(Call("aten.view.default", ({"i": 0}, [-1]), {}))
    found = find_difference(listing(made, locations=()), listing(other, locations=()))
    assert found is not None
    assert found.text == "constant [1, -1] against [-1] in argument 2 of aten.view"


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (("a.py:1", "a.py:1"), " at a.py:1"),
        (("p/a.py:1", "p/a.py:2"), " at p/a.py:1 against :2"),
        (("a.py:1", "b.py:2"), " at a.py:1 against b.py:2"),
        (("", "b.py:2"), " at b.py:2"),
        (("", ""), ""),
    ],
)
def test_locations(places: tuple[str, str], expected: str) -> None:
    made = program(Call("aten.relu.default", ({"i": 0},), {})), program(Call("aten.neg.default", ({"i": 0},), {}))
    found = find_difference(*(listing(p, locations=(at,)) for p, at in zip(made, places, strict=True)))
    assert found is not None
    assert found.text == f"call 1: aten.relu against aten.neg{expected}"
    assert found.locations == places


def test_the_size_that_chooses_the_artifact() -> None:
    assert text(listing(primary="")) == "the size that chooses the artifact is none against rows"
    other = listing(primary="s1", sizes={"s0": "columns", "s1": "rows"})
    assert text(other) == "the size that chooses the artifact is s1 against s0"


def test_json_alone_is_enough() -> None:
    made, other = program().to_json(), program(LINEAR, Call("aten.mul.Tensor", ({"n": 0}, 0.5), {}), SILU).to_json()
    assert first_difference(made, made) is None
    assert first_difference(made, json.loads(json.dumps(other))) == "call 2: aten.silu against aten.mul.Tensor"
    assert (
        first_difference({**made, "locations": list(LINES), "names": ["up"]}, other)
        == "call 2: aten.silu against aten.mul.Tensor at pkg/model.py:11"
    )


@pytest.mark.parametrize("data", [{}, {"calls": 1}, {**program().to_json(), "inputs": [[]]}])
def test_no_program(data: Mapping[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        first_difference(data, data)


@pytest.mark.parametrize(
    ("a", "b", "joined"),
    [
        ("layers.1.up", "layers.3.up", "layers.{1,3}.up"),
        ("layers.1.up", "layers.1.up", "layers.1.up"),
        ("layers.1.up", "layers.1.down", "layers.1.up against layers.1.down"),
        ("layers.1.up", "norm", "layers.1.up against norm"),
    ],
)
def test_join_names(a: str, b: str, joined: str) -> None:
    assert join_names(a, b) == joined


def test_the_layer_of_a_call() -> None:
    # w0 of layer 2; an addition between; w1 of layer 3
    calls = (
        LINEAR,
        SILU,
        Call("piecework.linear.default", ({"n": 1}, {"c": 1}, None), {}),
        Call("aten.add.Tensor", ({"n": 2}, {"i": 0}), {}),
        Call("piecework.linear.default", ({"n": 3}, {"c": 2}, None), {}),
        Call("aten.neg.default", ({"n": 4},), {}),
    )
    made = program(*calls, constants=(spec(16, 8), spec(8, 16), spec(16, 8)))
    layers = [2, 2, 3]
    assert [layer_of_call(made, n, layers=layers) for n in range(6)] == [2, 2, 2, None, 3, 3]
    assert layer_of_call(made, 3, layers=[None, None, 3]) == 3
    assert layer_of_call(made, 1, layers=[None] * 3) is None
