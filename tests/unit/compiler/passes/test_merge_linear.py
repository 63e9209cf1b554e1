"""Which linear layers become one, that results stay what they were, and how the plan makes the merged weight."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.bundle.plan import Plan
from piecework.bundle.recipes import Concat
from piecework.bundle.run.eager import EagerRunner
from piecework.compiler.passes.pipeline import Passed, Pipeline
from piecework.ops.ir.program import Call, Program, TensorSpec, constant_name
from piecework.spec.compile_options import BackendName, CompileOptions
from piecework.spec.passes import MERGE_LINEAR

_X = TensorSpec(("s0", 8), (8, 1), "float32", "cpu")


def _weight(rows: int) -> TensorSpec:
    return TensorSpec((rows, 8), (8, 1), "float32", "cpu")


def _linear(constant: int, *, of: dict[str, int] | None = None, bias: int | None = None) -> Call:
    extra = () if bias is None else ({"c": bias},)
    return Call("piecework.linear.default", (of or {"i": 0}, {"c": constant}, *extra), {})


QKV = Program(
    (("s0", 1, 64),),
    (_X,),
    (_weight(16), _weight(4), _weight(4), _weight(6)),
    (
        _linear(0),
        Call("aten.view.default", ({"n": 0}, [-1, 2, 8]), {}),
        _linear(1),
        Call("aten.silu.default", ({"i": 0},), {}),
        _linear(2),
        _linear(3, of={"n": 3}),
    ),
    ({"n": 1}, {"n": 2}, {"n": 4}, {"n": 5}),
)


def _merged(program: Program, *, strict_outputs: frozenset[int] = frozenset()) -> Passed:
    return Pipeline([MERGE_LINEAR]).run(program, strict_outputs=strict_outputs)


def _results(program: Program, constants: list[Tensor], x: Tensor) -> list[Tensor]:
    runner = EagerRunner(program)
    runner.bind({constant_name(i): tensor for i, tensor in enumerate(constants)})
    return runner.run([x])


def test_layers_that_read_the_same_tensor_become_one() -> None:
    merged = _merged(QKV)
    assert merged.rewritten.constants == ((0, 1, 2), (3,))
    assert [spec.shape for spec in merged.rewritten.program.constants] == [(24, 8), (6, 8)]
    assert sum(call.target == "piecework.linear.default" for call in merged.rewritten.program.calls) == 2
    assert merged.reports[0].matches == ("merged 3 linear layers of 16 + 4 + 4 outputs",)
    assert merged.rewritten.origins == ((0, 2, 4), (0,), (1,), (2,), (3,), (4,), (5,))
    weights = [torch.randn(*spec.shape) for spec in QKV.constants]  # type: ignore[arg-type]
    x = torch.randn(5, 8)
    expected = _results(QKV, weights, x)
    found = _results(merged.rewritten.program, [torch.cat(weights[:3]), weights[3]], x)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


def test_biases_are_merged_with_their_weights() -> None:
    bias = TensorSpec((4,), (1,), "float32", "cpu")
    program = replace(
        QKV,
        constants=(_weight(4), bias, _weight(4), bias),
        calls=(_linear(0, bias=1), _linear(2, bias=3)),
        outputs=({"n": 0}, {"n": 1}),
    )
    merged = _merged(program)
    assert merged.rewritten.constants == ((0, 2), (1, 3))
    constants = [torch.randn(*spec.shape) for spec in program.constants]  # type: ignore[arg-type]
    x = torch.randn(3, 8)
    found = _results(merged.rewritten.program, [torch.cat([constants[0], constants[2]]), torch.cat(constants[1::2])], x)
    for a, b in zip(_results(program, constants, x), found, strict=True):
        torch.testing.assert_close(a, b)


def test_two_groups_in_one_piece() -> None:
    program = replace(
        QKV,
        constants=tuple(_weight(8) for _ in range(4)),
        calls=(_linear(0), _linear(1), _linear(2, of={"n": 1}), _linear(3, of={"n": 1})),
        outputs=({"n": 0}, {"n": 2}, {"n": 3}),
    )
    merged = _merged(program)
    assert merged.rewritten.constants == ((0, 1), (2, 3))
    weights = [torch.randn(8, 8) for _ in range(4)]
    x = torch.randn(3, 8)
    found = _results(merged.rewritten.program, [torch.cat(weights[:2]), torch.cat(weights[2:])], x)
    for a, b in zip(_results(program, weights, x), found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_result_that_another_piece_reads_keeps_its_strides() -> None:
    merged = _merged(QKV, strict_outputs=frozenset({1}))
    assert merged.rewritten.program == QKV
    assert "another piece reads result 1" in merged.reports[0].near_misses[0]
    assert _merged(QKV, strict_outputs=frozenset({3})).rewritten.program != QKV  # its layer isn't one of those


@pytest.mark.parametrize(
    ("change", "value"),
    [("dtype", "bfloat16"), ("shape", (4, 9)), ("stride", (1, 4)), ("device", "cuda")],
)
def test_weights_that_differ_stay_apart(change: str, value: object) -> None:
    program = replace(QKV, constants=(_weight(4), replace(_weight(4), **{change: value})))  # type: ignore[arg-type]
    program = replace(program, calls=(_linear(0), _linear(1)), outputs=({"n": 0}, {"n": 1}))
    assert _merged(program).rewritten.program == program


def test_a_weight_with_other_uses_stays_apart() -> None:
    lookup = Call("aten.embedding.default", ({"c": 0}, {"i": 0}), {})
    program = replace(QKV, constants=(_weight(4), _weight(4)), calls=(_linear(0), _linear(1), lookup))
    program = replace(program, outputs=({"n": 0}, {"n": 1}))
    assert _merged(program).rewritten.program == program


def test_what_needs_contiguous_results_is_left_alone() -> None:
    flat = Call("aten.view.default", ({"n": 0}, [-1]), {})
    program = replace(QKV, constants=(_weight(4), _weight(4)), calls=(_linear(0), _linear(1), flat))
    merged = _merged(replace(program, outputs=({"n": 2}, {"n": 1})))
    assert merged.rewritten.constants == ((0,), (1,))
    assert "view" in merged.reports[0].near_misses[0]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 16)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def test_a_bundle_with_merged_weights_is_loaded_from_the_modules_own(tmp_path: Path) -> None:
    module = nn.Sequential(*(_Block() for _ in range(3))).eval()
    options = CompileOptions(backend=BackendName.EAGER)
    bundle = piecework.compile(
        module, (torch.randn(4, 8),), dynamic={"rows": piecework.Dim(1, 64)}, options=options, out=tmp_path / "b"
    )
    x = torch.randn(7, 8)
    torch.testing.assert_close(piecework.load(bundle, weights=module)(x), module(x))
    plan = Plan.from_json(json.loads((tmp_path / "b" / "plan.json").read_text()))
    merged = [recipe for recipe in plan.recipes if isinstance(recipe.source, Concat)]
    assert [recipe.name for recipe in merged if recipe.shape == (32, 8)] == [
        f"{n}.gate.weight + up.weight" for n in range(3)
    ]
    apart = [recipe.name for recipe in plan.captured_constants(plan.instances[0])]
    assert {"0.gate.weight", "0.up.weight", "0.down.weight"} <= set(apart)
