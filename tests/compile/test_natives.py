"""Bodies inside opaque ops as native code: right at all sizes, found without Dynamo, reused, owned by their model."""

from __future__ import annotations

import functools
import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import piecework
from piecework.bundle.bundle import Bundle
from piecework.bundle.plan import Plan
from piecework.foundation.torch_private import read_calls
from piecework.ops.activations import silu_mul
from piecework.ops.moe.experts import moe_experts
from piecework.ops.norms import rms_norm
from tests.choice import slow_but
from tests.unit.compiler.native_modules import WIDTH, gated_int8, layers

ROWS = 64


@pytest.fixture(scope="session")
def bundle_of(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Bundle]:
    """The same module in the dtype that is asked for."""

    @functools.cache
    def make(dtype: torch.dtype) -> Bundle:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PIECEWORK_HOME", str(home))
            return _compiled(layers(dtype), dtype, out=tmp_path_factory.mktemp("natives") / "bundle")

    return make


def _compiled(module: nn.Module, dtype: torch.dtype, **kwargs: Any) -> Bundle:
    sizes = {"rows": piecework.Dim(0, ROWS)}
    return piecework.compile(module, (torch.randn(3, WIDTH, dtype=dtype),), dynamic=sizes, **kwargs)


@pytest.fixture
def nothing_compiles() -> Iterator[None]:
    """Let Dynamo fail where it would compile anything."""
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.bfloat16]))
def test_results_are_the_native_ones(
    bundle_of: Callable[[torch.dtype], Bundle], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = layers(dtype)
    model = piecework.load(bundle_of(dtype), weights=module)
    given = [torch.randn(rows, WIDTH, dtype=dtype) for rows in (0, 1, 2, 33, ROWS)]
    expected = [module(x) for x in given]
    for op in (silu_mul, rms_norm, gated_int8):
        monkeypatch.setattr(op, "native", _never)
    tolerance = 2e-2 if dtype is torch.float32 else 2e-1  # an int8 step, where a half is rounded the other way
    for x, wanted in zip(given, expected, strict=True):
        with piecework.providers("native"), piecework.providers("native"):
            torch.testing.assert_close(model(x), wanted, atol=tolerance, rtol=tolerance)
    assert model.native_fallbacks == {}


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a call that has a body ran natively")


def test_a_second_compile_makes_nothing(bundle_of: Callable[[torch.dtype], Bundle]) -> None:
    first = bundle_of(torch.float32).record().counts
    again = _compiled(layers(num_layers=3), torch.float32)
    counts = again.record().counts
    assert counts["natives"] == first["natives"] == 3
    assert counts["compiled"] == 0, "one layer more has the same pieces and the same bodies"
    composed = Plan.from_json(again.plan()).natives[2].artifact
    assert read_calls(again.artifact_path(composed)) == "", "the operators that it is composed of are inlined"


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiles")
def test_two_models_of_different_dtypes_and_options(bundle_of: Callable[[torch.dtype], Bundle]) -> None:
    wide, narrow = layers(), layers(torch.bfloat16)
    models = [
        piecework.load(bundle_of(torch.float32), weights=wide),
        piecework.load(bundle_of(torch.bfloat16), weights=narrow),
        piecework.load(
            _compiled(wide, torch.float32, options=piecework.CompileOptions(passes_off=frozenset({"merge_linear"}))),
            weights=wide,
        ),
    ]
    x = torch.randn(5, WIDTH)
    expected = [wide(x), narrow(x.bfloat16()), wide(x)]
    for _ in range(2):
        for model, given, wanted in zip(models, (x, x.bfloat16(), x), expected, strict=True):
            torch.testing.assert_close(model(given), wanted, atol=2e-1, rtol=2e-1)
    owners = [{id(s.bodies) for s in model._natives.values()} for model in models]
    assert [len(ids) for ids in owners] == [1, 1, 1]
    assert len(set.union(*owners)) == 3
    models[0].close()
    torch.testing.assert_close(models[2](x), expected[2], atol=2e-2, rtol=2e-2)
    assert all(model.native_fallbacks == {} for model in models)


@pytest.mark.slow
def test_unloading_frees(bundle_of: Callable[[torch.dtype], Bundle]) -> None:
    module = layers()
    for close in (True, False):
        model = piecework.load(bundle_of(torch.float32), weights=module)
        model(torch.randn(2, WIDTH))
        (owned, *_) = [s.bodies for s in model._natives.values()]
        assert owned is not None
        runners = [weakref.ref(body._run.__self__) for body in owned.bodies]
        assert all(runner() is not None for runner in runners)
        del owned
        if close:
            model.close()
        else:
            del model
        gc.collect()
        assert [runner() for runner in runners] == [None] * 3


class Experts(nn.Module):
    """Routed experts, whose opaque op and its activation are our own: another process knows them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 32, 16) / 4)
        self.down = nn.Parameter(torch.randn(4, 16, 16) / 4)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        made: Tensor = moe_experts(hidden * 1, ids, weights, self.gate_up, self.down)
        return made + 1


@pytest.mark.slow
def test_another_process_loads_them_and_no_compiler(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Experts().requires_grad_(False)
    given = torch.randn(5, 16), torch.randint(4, (5, 2)), torch.rand(5, 2)
    bundle = piecework.compile(module, given, dynamic={"tokens": piecework.Dim(1, 32)}, out=tmp_path / "experts.pwb")
    (native,) = Plan.from_json(bundle.plan()).natives
    assert native.ops == ("piecework::moe_experts",)
    assert native.form.text() == "silu_mul(float32[s0, 16], float32[s0, 16])"
    assert native.form.sizes == (("s0", 1, 64),)
    expected = module(*given)
    inputs = dict(zip(("hidden", "ids", "weights", "expected"), (*given, expected), strict=True))
    save_file({**module.state_dict(), **inputs}, tmp_path / "tensors.safetensors")
    code = """
import json, sys, torch, piecework
from safetensors.torch import load_file
from piecework.ops.activations import silu_mul
given = load_file(sys.argv[2])
model = piecework.load(sys.argv[1], weights=given)
def never(*args):
    raise AssertionError("ran natively")
silu_mul.native = never
found = model(given["hidden"], given["ids"], given["weights"])
modules = ("torch._dynamo", "torch._inductor", "sympy", "piecework.compiler", "piecework.capture")
imported = [m for m in modules if m in sys.modules]
torch.testing.assert_close(found, given["expected"], atol=1e-5, rtol=1e-5)
print(json.dumps([imported, dict(model.native_fallbacks)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "experts.pwb"), str(tmp_path / "tensors.safetensors")],
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[], {}]
