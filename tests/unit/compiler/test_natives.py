"""Calls inside opaque ops: what is declared becomes bodies of the bundle, once each, by the bundle's providers."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.bundle.plan import Plan
from piecework.errors import OpError
from piecework.ops.activations import silu_mul
from piecework.ops.ir.selection import current_selection
from piecework.ops.moe.layer import MoeWeights, moe_forward
from piecework.ops.norms import rms_norm
from tests.unit.compiler.native_modules import WIDTH, activate, gated_int8, layers

EAGER = piecework.BackendName.EAGER
_NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def use_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))


def compiled(
    module: nn.Module, *, providers: str = "native", rows: int = 16, dtype: torch.dtype = torch.float32
) -> Any:
    options = piecework.CompileOptions(backend=EAGER, providers=piecework.ProviderOrder.parse(providers))
    example = (torch.randn(3, WIDTH, dtype=dtype),)
    return piecework.compile(module, example, dynamic={"rows": piecework.Dim(1, rows)}, options=options)


def test_each_different_call_is_one_body() -> None:
    bundle = compiled(layers())
    plan = Plan.from_json(bundle.plan())
    assert [n.form.text() for n in plan.natives] == [
        "silu_mul(float32[s0, 32], float32[s0, 32])",
        "rms_norm(float32[s0, 32], float32[32], 1e-05, 0.0, True)",
        "piecework_test_natives::gated_int8(float32[s0, 32], float32[s0, 32])",
    ]
    assert all(n.form.sizes == (("s0", 0, 16),) for n in plan.natives)
    assert [n.form.arguments[0].stride for n in plan.natives] == [(64, None), (None, None), (64, None)]
    assert {n.ops for n in plan.natives} == {("piecework_test_natives::activate",)}
    assert [n.provider for n in plan.natives] == ["native"] * 3
    assert Plan.from_json(plan.to_json()) == plan
    record = bundle.record()
    assert record.counts["natives"] == 3
    assert record.counts["compiled"] == record.counts["unique_pieces"] + 3
    assert set(bundle.artifacts) >= {n.artifact for n in plan.natives}


def test_a_composed_op_is_one_body_of_torchs_operators() -> None:
    bundle = compiled(layers())
    plan = Plan.from_json(bundle.plan())
    (composed,) = (n for n in plan.natives if n.form.op == gated_int8.name)
    program = bundle.artifact_path(composed.artifact).read_text()
    assert '"aten.silu.default"' in program
    assert '"aten.amax.default"' in program
    assert "piecework" not in program


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_the_same_with_its_bodies(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module = layers(dtype)
    model = piecework.load(compiled(module, dtype=dtype), weights=module)
    given = [torch.randn(rows, WIDTH, dtype=dtype) for rows in (1, 2, 16)]
    expected = [module(x) for x in given]
    for op in (silu_mul, rms_norm, gated_int8):
        monkeypatch.setattr(op, "native", _never)
    for x, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(model(x), wanted, atol=2e-2, rtol=2e-2)
    assert model.native_fallbacks == {}
    assert current_selection() is None


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a call that has a body ran natively")


@pytest.mark.slow
def test_two_models_have_their_own_bodies() -> None:
    seen: list[Any] = []

    def note(x: Tensor, weight: Tensor, layer: str) -> Tensor:
        seen.append(current_selection())
        return function(x, weight, layer)

    function = activate.function
    wide, narrow = layers(), layers(torch.bfloat16)
    first = piecework.load(compiled(wide, providers="aten,native"), weights=wide)
    activate.function = note
    try:
        models = [first, *(piecework.load(compiled(m, dtype=m.weight.dtype), weights=m) for m in (wide, narrow))]
        first._prepare()
        for model, dtype in zip(models, (torch.float32, torch.float32, torch.bfloat16), strict=True):
            model(torch.randn(2, WIDTH, dtype=dtype))
            with piecework.providers("native"):
                model(torch.randn(2, WIDTH, dtype=dtype))
            assert model.native_fallbacks == {}
    finally:
        activate.function = function
    assert [s.order.text() for s in seen] == ["aten,native"] * 4 + ["native"] * 8
    assert len({id(s.bodies) for s in seen}) == 3
    assert len({id(s.bodies) for s in seen[:4]}) == 1
    assert [b.form.arguments[0].dtype for b in seen[-1].bodies.bodies] == ["bfloat16"] * 3
    assert current_selection() is None


def test_closing_frees_the_bodies() -> None:
    module = layers()
    model = piecework.load(compiled(module), weights=module)
    owned = next(iter(model._natives.values())).bodies
    assert owned is not None
    runners = [weakref.ref(body._run.__self__) for body in owned.bodies]
    del owned
    model.close()
    gc.collect()
    assert [runner() for runner in runners] == [None] * 3


def test_other_arguments_than_declared_run_natively_and_are_counted() -> None:
    _, module = _module_with(lambda sizes, x: [(silu_mul, (x.new_empty(2, 7), x.new_empty(2, 7)))])
    model = piecework.load(compiled(module), weights=module)
    x = torch.randn(3, WIDTH)
    for _ in range(2):
        torch.testing.assert_close(model(x), module(x))
    assert model.native_fallbacks == {"silu_mul(float32[*, 16], float32[*, 16])": 2}
    model.close()
    assert model.native_fallbacks == {}


def test_a_called_provider_is_called() -> None:
    provider = f"mine_{next(_NUMBERS)}"
    called = []

    @silu_mul.implement(provider, supports=lambda gate, up: gate.shape[-1] == 16 or "another width")
    def _(gate: Tensor, up: Tensor) -> Tensor:
        called.append(tuple(gate.shape))
        return silu_mul.native(gate, up)

    _, module = _module_with(lambda sizes, x: [(silu_mul, x.chunk(2, -1))])
    bundle = compiled(module, providers=f"{provider},native")
    (native,) = Plan.from_json(bundle.plan()).natives
    assert (native.provider, native.piece) == (provider, None)
    model = piecework.load(bundle, weights=module)
    model(torch.randn(3, WIDTH))
    assert called == [(3, 16)]
    other = compiled(layers(), providers=f"{provider},native")
    assert {n.provider for n in Plan.from_json(other.plan()).natives} == {"native"}, "supports() says no"


def test_a_body_that_calls_a_provider() -> None:
    provider = f"mine_{next(_NUMBERS)}"

    @silu_mul.implement(provider)
    def _(gate: Tensor, up: Tensor) -> Tensor:
        return silu_mul.native(gate, up)

    module = layers()
    bundle = compiled(module, providers=f"{provider},native")
    composed = Plan.from_json(bundle.plan()).natives[2]
    assert f"piecework__{provider}.silu_mul.default" in bundle.artifact_path(composed.artifact).read_text()
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(piecework.load(bundle, weights=module)(x), module(x))


def _module_with(calls: Callable[..., Any]) -> tuple[Any, nn.Module]:
    """Return an opaque op that calls silu_mul, with a declaration, and a module around it."""

    def halved(x: Tensor) -> Tensor:
        return silu_mul(*x.chunk(2, -1))

    op = piecework.opaque_op(f"piecework_test_natives::halved_{next(_NUMBERS)}")(halved)
    op.fake(lambda x: x.new_empty(x.shape[0], x.shape[1] // 2))
    op.calls(calls)

    class Around(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = op(x * 1)
            return made + 1

    return op, Around()


WRONG: list[tuple[Callable[..., Any], str]] = [
    (lambda sizes, x: None, "a declaration that gives None"),
    (lambda sizes, x: [silu_mul], "the declared call <op piecework::silu_mul"),
    (lambda sizes, x: [(silu_mul, x)], "the declared call"),
    (lambda sizes, x: [(torch.add, (x, x))], "no operator that has providers"),
    (lambda sizes, x: [(silu_mul, (x,))], "silu_mul with 1 arguments"),
    (lambda sizes, x: [(silu_mul, (x, x), {"wrong": 1})], "by name"),
    (lambda sizes, x: [(silu_mul, (x, x[:, :5]))], "does not take such arguments"),
    (lambda sizes, x: [(silu_mul, (1, 2))], "does not take such arguments"),
    (lambda sizes, x: [(silu_mul, (x.nothing, x))], "AttributeError"),
    (lambda sizes, x: [(silu_mul, [x.new_empty(5, x.shape[0]).t()] * 2)], "whose stride along axis 1 is"),
    (lambda sizes, x: [(silu_mul, (x.new_empty(sizes.dynamic(3, low=4), 5),) * 2)], "a dynamic size from 4 to 3"),
    (lambda sizes, x: [(silu_mul, (x.new_empty(sizes.dynamic(3, low=-1), 5),) * 2)], "a dynamic size from -1 to 3"),
    (lambda sizes, x: [(rms_norm, (x, None, float(x.sum())))], "look at shapes|Error"),
]


@pytest.mark.parametrize(("calls", "found"), WRONG)
def test_a_wrong_declaration_is_an_error_that_names_the_op(calls: Callable[..., Any], found: str) -> None:
    op, module = _module_with(calls)
    with pytest.raises(OpError, match=found or None) as error:
        compiled(module)
    assert op.name in error.value.asked


@pytest.mark.parametrize("calls", [list, lambda sizes: [], lambda sizes, y: [], lambda *, sizes, x: []])
def test_a_declaration_takes_sizes_and_what_the_op_takes(calls: Callable[..., Any]) -> None:
    with pytest.raises(OpError, match=r"takes|no first parameter"):
        _module_with(calls)


def test_an_operator_that_calls_itself_is_refused() -> None:
    name = f"piecework_test_natives::endless_{next(_NUMBERS)}"

    def endless(x: Tensor) -> Tensor:
        return op(x) if x.dim() == 2 else x.clone()

    op = piecework.op(name, inputs=lambda draw: (draw.tensor(2, 2),), tolerance={})(endless)
    _, module = _module_with(lambda sizes, x: [(op, (x,))])
    with pytest.raises(OpError, match="recursion"):
        compiled(module)


def test_sizes_are_bounded_by_the_arguments() -> None:
    _, module = _module_with(
        lambda sizes, x: [
            (silu_mul, x.new_empty(sizes.dynamic(3 * x.shape[0], low=1), 10).chunk(2, -1)),
            (silu_mul, x.new_empty(2 * x.shape[0], 10).chunk(2, -1)),
            (silu_mul, x.new_empty(4, 10).chunk(2, -1)),
        ]
    )
    plan = Plan.from_json(compiled(module).plan())
    assert [n.form.sizes for n in plan.natives] == [(("s0", 1, 48),), (("s0", 2, 32),), ()]


def test_experts_that_are_found_by_name_are_declared_where_a_context_runs() -> None:
    weights = MoeWeights(torch.randn(4, 16, WIDTH), torch.randn(4, WIDTH, 8), top_k=2)

    class Around(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = moe_forward(x * 1, x[:, :4], "experts")
            return made + 1

    context = piecework.ForwardContext({"experts": weights})
    assert Plan.from_json(compiled(Around()).plan()).natives == ()
    with context.running():
        bundle = compiled(Around())
        (native,) = Plan.from_json(bundle.plan()).natives
        assert native.form.text() == "silu_mul(float32[s0, 8], float32[s0, 8])"
        assert native.form.sizes == (("s0", 1, 32),)
        model, x = piecework.load(bundle, weights={}), torch.randn(5, WIDTH)
        torch.testing.assert_close(model(x), Around()(x), atol=1e-4, rtol=1e-4)
        assert model.native_fallbacks == {}
