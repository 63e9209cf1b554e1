"""IR ops in pieces: which provider each gets, that results stay the same at every size, what is in place."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import piecework
import piecework.compiler.passes.lower as lower_module
from piecework.bundle.run.eager import EagerRunner
from piecework.compiler.encode import encode_torch_type
from piecework.compiler.passes.lower import Lowering
from piecework.errors import OpError
from piecework.ops.catalogue import CHOSEN
from piecework.ops.ir.inputs import Draw
from piecework.ops.ir.op import IrOp
from piecework.ops.ir.program import Call, Program, TensorSpec, constant_name, encode_float
from piecework.ops.ir.provider_order import ProviderOrder
from piecework.providers.discovery import load_providers
from tests.unit.ops.ir_cases import SEEDS, assert_close

load_providers(["aten"])
NATIVE = Lowering(ProviderOrder())
_NUMBERS = itertools.count()


def _tensor(*shape: int | str, dtype: str = "float32") -> TensorSpec:
    strides: list[int | str] = [1]
    for size in reversed(shape[1:]):
        inner = strides[0]
        strides.insert(0, inner * size if isinstance(inner, int) and isinstance(size, int) else f"{inner}*{size}")
    return TensorSpec(shape, tuple(strides), dtype, "cpu")


MLP = Program(
    (("s0", 0, 64),),
    (_tensor("s0", 16), _tensor("s0", 16)),
    (_tensor(16), _tensor(24, 16), _tensor(24, 16)),
    (
        Call("piecework.add_rms_norm.default", ({"i": 0}, {"i": 1}, {"c": 0}, 1e-6), {}),
        Call("operator.getitem", ({"n": 0}, 0), {}),
        Call("operator.getitem", ({"n": 0}, 1), {}),
        Call("piecework.linear.default", ({"n": 1}, {"c": 1}), {}),
        Call("piecework.linear.default", ({"n": 1}, {"c": 2}), {}),
        Call("piecework.silu_mul.default", ({"n": 3}, {"n": 4}), {}),
        Call("aten.add.Tensor", ({"n": 5}, 1), {}),
    ),
    ({"n": 6}, {"n": 2}),
)


def _run(program: Program, constants: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    runner = EagerRunner(program)
    runner.bind({constant_name(i): tensor for i, tensor in enumerate(constants)})
    return runner.run(inputs)


def _targets(program: Program) -> list[str]:
    return [call.target for call in program.calls]


def _values(specs: tuple[TensorSpec, ...], rows: int) -> list[Tensor]:
    return [torch.randn(*(rows if d == "s0" else int(d) for d in spec.shape)) for spec in specs]


def test_native_bodies_are_written_out() -> None:
    lowered = NATIVE.lower(MLP)
    assert [(site.op, site.provider) for site in lowered.sites] == [("add_rms_norm", "native"), ("silu_mul", "native")]
    assert lowered.sites[0].arguments == "float32[s0, 16], float32[s0, 16], float32[16], 1e-06"
    targets = _targets(lowered.program)
    assert [t for t in targets if not t.startswith("aten.")] == ["piecework.linear.default"] * 2
    assert "aten.rsqrt.default" in targets
    assert "aten.silu.default" in targets
    constants = _values(MLP.constants, 0)
    for rows in (0, 1, 5, 64):
        inputs = _values(MLP.inputs, rows)
        for a, b in zip(_run(MLP, constants, inputs), _run(lowered.program, constants, inputs), strict=True):
            assert torch.equal(a, b)


def test_a_program_without_ir_ops_stays_as_it_is() -> None:
    program = Program((), (_tensor(4, 4),), (), (Call("aten.relu.default", ({"i": 0},), {}),), ({"n": 0},))
    assert NATIVE.lower(program).program is program


def test_torchs_own_norms_are_written_out_too() -> None:
    lowered = Lowering(ProviderOrder(default=("aten", "native"))).lower(MLP)
    assert [site.provider for site in lowered.sites] == ["aten", "native"]
    assert [(r.provider, r.why) for r in lowered.sites[1].rejected] == [
        ("aten", "it has no implementation of silu_mul")
    ]
    assert all(not target.startswith("piecework.add_rms") for target in _targets(lowered.program))
    constants, inputs = _values(MLP.constants, 0), _values(MLP.inputs, 7)
    for a, b in zip(_run(MLP, constants, inputs), _run(lowered.program, constants, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_a_layer_norm_of_torchs_is_one_kernel() -> None:
    calls = (Call("piecework.layer_norm.default", ({"i": 0}, None, None, 1e-5), {}),)
    program = Program((("s0", 1, 8),), (_tensor("s0", 16),), (), calls, ({"n": 0},))
    lowered = Lowering(ProviderOrder(default=("aten", "native"))).lower(program)
    assert _targets(lowered.program) == ["aten.native_layer_norm.default", "operator.getitem"]


@pytest.mark.parametrize("op", CHOSEN, ids=lambda op: op.short_name)
def test_every_op_can_be_written_out(op: IrOp) -> None:
    for seed in SEEDS:
        args = op.make_inputs(seed, dtype=torch.bfloat16)
        program = _program_of(op, args)
        tensors = [a for a in args if isinstance(a, Tensor)]
        lowered = NATIVE.lower(program).program
        assert all(t.startswith(("aten.", "operator.")) for t in _targets(lowered))
        found = _run(lowered, [], tensors)
        assert_close(op, tuple(found) if len(found) > 1 else found[0], op.native(*args), dtype=torch.bfloat16)


def _program_of(op: IrOp, args: tuple[Any, ...]) -> Program:
    """Return a program of one call, all of whose sizes are symbols where a tensor is contiguous."""
    inputs, encoded = [], []
    for value in args:
        if isinstance(value, Tensor):
            encoded.append({"i": len(inputs)})
            dtype = str(value.dtype).removeprefix("torch.")
            inputs.append(TensorSpec(tuple(value.shape), value.stride(), dtype, "cpu"))
        else:
            encoded.append(encode_float(value) if isinstance(value, float) else encode_torch_type(value) or value)
    calls = [Call(f"{op.name.replace('::', '.')}.default", tuple(encoded), {})]
    made = op.native(*args)
    if isinstance(made, tuple):
        calls += [Call("operator.getitem", ({"n": 0}, i), {}) for i in range(len(made))]
        return Program((), tuple(inputs), (), tuple(calls), tuple({"n": i + 1} for i in range(len(made))))
    return Program((), tuple(inputs), (), tuple(calls), ({"n": 0},))


_SYMBOLIC: dict[str, tuple[tuple[TensorSpec, ...], tuple[Any, ...]]] = {
    "rms_norm": ((_tensor(1, "s0", 16), _tensor(16)), ()),
    "layer_norm": ((_tensor("s0", 16), _tensor(16), _tensor(16)), ()),
    "gelu_mul": ((_tensor("s0", 16), _tensor("s0", 16)), ("tanh",)),
    "quantize_static_fp8": ((_tensor("s0", 16), _tensor(1)), ()),
    "quantize_dynamic_per_token": ((_tensor("s0", 16),), ({"dtype": "int8"},)),
    "quantize_group_fp8": ((_tensor("s0", 16),), (8,)),
    "moe_route": ((_tensor("s0", 16),), (2, "sigmoid", True, None, 4, 2)),
}


@pytest.mark.parametrize("name", sorted(_SYMBOLIC))
def test_bodies_hold_for_every_number_of_rows(name: str) -> None:
    op = next(o for o in CHOSEN if o.short_name == name)
    specs, options = _SYMBOLIC[name]
    args = (*({"i": i} for i in range(len(specs))), *options)
    results = 2 if name in {"quantize_dynamic_per_token", "quantize_group_fp8", "moe_route"} else 1
    calls = [Call(f"piecework.{name}.default", args, {})]
    calls += [Call("operator.getitem", ({"n": 0}, i), {}) for i in range(results) if results > 1]
    outputs = tuple({"n": i + (results > 1)} for i in range(results))
    program = Program((("s0", 0, 4096),), specs, (), tuple(calls), outputs)
    lowered = NATIVE.lower(program, strict_outputs=frozenset(range(results))).program
    for rows in (0, 1, 2, 33):
        inputs = _values(specs, rows)
        found = _run(lowered, [], inputs)
        expected = _run(program, [], inputs)
        assert_close(op, tuple(found), tuple(expected), dtype=torch.float32)


def test_rotary_with_a_symbolic_number_of_tokens() -> None:
    q = TensorSpec((1, 4, "s0", 16), ("64*s0", 16, 64, 1), "float32", "cpu")
    angles = _tensor(1, 1, "s0", 16)
    calls = [Call("piecework.rotary.default", ({"i": 0}, {"i": 0}, {"i": 1}, {"i": 2}), {})]
    calls += [Call("operator.getitem", ({"n": 0}, i), {}) for i in range(2)]
    program = Program((("s0", 1, 64),), (q, angles, angles), (), tuple(calls), ({"n": 1}, {"n": 2}))
    lowered = NATIVE.lower(program, strict_outputs=frozenset({0, 1})).program
    for rows in (1, 5):
        x = torch.randn(1, rows, 4, 16).transpose(1, 2)
        inputs = [x, torch.randn(1, 1, rows, 16), torch.randn(1, 1, rows, 16)]
        for a, b in zip(_run(lowered, [], inputs), _run(program, [], inputs), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


def test_equal_calls_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    real = lower_module.trace_body
    monkeypatch.setattr(lower_module, "trace_body", lambda *a, **k: traced.append(1) or real(*a, **k))
    lowering = Lowering(ProviderOrder())
    lowering.lower(MLP)
    lowering.lower(MLP)
    assert len(traced) == 2, "one for each op"


def _add_inputs(draw: Draw) -> tuple[Any, ...]:
    return draw.tensor(draw.rows, 16), draw.tensor(draw.rows, 16)


@pytest.fixture
def doubled() -> IrOp:
    """Return an op of its own name for each test."""

    def doubled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2 + y, y * 2

    name = f"piecework_test_lower::doubled_{next(_NUMBERS)}"
    return piecework.op(name, inputs=_add_inputs, tolerance={torch.float32: 1e-6})(doubled)


def _doubled_program(op: IrOp, *, x: dict[str, int], later: tuple[Call, ...] = (), outputs: Any = None) -> Program:
    """Compute 0: x + 1, 1: a view of it, 2: doubled(x, input 1), and its results 3 and 4."""
    calls = (
        Call("aten.add.Tensor", ({"i": 0}, 1), {}),
        Call("aten.view.default", ({"n": 0}, [-1]), {}),
        Call(f"{op.name.replace('::', '.')}.default", (x, {"i": 1}), {}),
        Call("operator.getitem", ({"n": 2}, 0), {}),
        Call("operator.getitem", ({"n": 2}, 1), {}),
        *later,
    )
    inputs = (_tensor("s0", 16), _tensor("s0", 16))
    return Program((("s0", 1, 64),), inputs, (), calls, outputs or ({"n": 3}, {"n": 4}))


def test_a_call_stays_one_where_the_provider_is_called(doubled: IrOp) -> None:
    @doubled.implement("called")
    def called(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2 + y, y * 2

    order = ProviderOrder(per_op={doubled.name: ("called", "native")})
    program = _doubled_program(doubled, x={"n": 0})
    lowered = Lowering(order).lower(program)
    assert lowered.sites[0].provider == "called"
    assert f"piecework_test_lower__called.{doubled.name.partition('::')[2]}.default" in _targets(lowered.program)
    inputs = _values(program.inputs, 3)
    for a, b in zip(_run(lowered.program, [], inputs), _run(program, [], inputs), strict=True):
        assert torch.equal(a, b)


def test_in_place_only_where_the_argument_is_dead(doubled: IrOp) -> None:
    @doubled.implement("in_place", reuses=("x",))
    def in_place(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.mul_(2).add_(y), y * 2

    lowering = Lowering(ProviderOrder(per_op={doubled.name: ("in_place", "native")}))
    dead = _doubled_program(doubled, x={"n": 0})
    lowered = lowering.lower(dead)
    assert lowered.sites[0].provider == "in_place"
    inputs = _values(dead.inputs, 5)
    before = [tensor.clone() for tensor in inputs]
    with piecework.check_ops():
        found = _run(lowered.program, [], inputs)
    for a, b in zip(found, _run(dead, [], inputs), strict=True):
        assert torch.equal(a, b)
    assert all(map(torch.equal, inputs, before))
    reads_a_view = (Call("aten.neg.default", ({"n": 1},), {}),)
    alive = {
        "an input": _doubled_program(doubled, x={"i": 0}),
        "a result": _doubled_program(doubled, x={"n": 0}, outputs=({"n": 3}, {"n": 0})),
        "a view read later": _doubled_program(doubled, x={"n": 0}, later=reads_a_view, outputs=({"n": 3}, {"n": 5})),
    }
    for what, program in alive.items():
        site = lowering.lower(program).sites[0]
        assert site.provider == "native", what
        assert site.rejected[0].why == "it writes to x, which the piece or its caller still reads"


def test_an_answer_that_depends_on_the_size_is_a_no(doubled: IrOp) -> None:
    @doubled.implement("small", inlined=True, supports=lambda x, y: x.shape[0] <= 48 or "too many rows")
    def small(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2 + y, y * 2

    @doubled.implement("counts", inlined=True)
    def counts(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x * 2 + y, y * 2) if x.shape[0] % 2 == 0 else (x + x + y, y + y)

    @doubled.implement("looks", inlined=True, supports=lambda x, y: bool(x.sum() > 0))
    def looks(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2 + y, y * 2

    order = ProviderOrder(per_op={doubled.name: ("small", "counts", "looks", "native")})
    site = Lowering(order).lower(_doubled_program(doubled, x={"n": 0})).sites[0]
    assert site.provider == "native"
    reasons = {r.provider: r.why for r in site.rejected}
    assert "yes only where" in reasons["small"]
    assert "s0 from 1 to 64" in reasons["small"]
    assert "it holds only where" in reasons["counts"]
    assert "looks at the values" in reasons["looks"]


def test_a_range_that_covers_the_declared_sizes_applies() -> None:
    sites = Lowering(ProviderOrder.parse(["add_rms_norm[0:64]=aten", "native"])).lower(MLP).sites
    assert [s.provider for s in sites] == ["aten", "native"]
    sites = Lowering(ProviderOrder.parse(["add_rms_norm[1:64]=aten", "native"])).lower(MLP).sites
    assert sites[0].provider == "native"
    assert sites[0].rejected[0].why == "asked for 1 to 64 rows, the call may have 0 to 64"


def test_other_results_than_the_ops_are_refused(doubled: IrOp) -> None:
    @doubled.implement("narrow", inlined=True)
    def narrow(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x * 2 + y).half(), y * 2

    lowering = Lowering(ProviderOrder(per_op={doubled.name: ("narrow",)}))
    with pytest.raises(OpError, match=r"float16\[s0, 16\]"):
        lowering.lower(_doubled_program(doubled, x={"n": 0}))


def test_no_provider_left_is_an_error() -> None:
    with pytest.raises(OpError, match="add_rms_norm=nobody,native"):
        Lowering(ProviderOrder(default=("nobody",)), absent={"nobody": "not installed"}).lower(MLP)
