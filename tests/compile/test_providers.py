"""Native code that calls a provider's operators: functional ones and ones in place, from a package made on the fly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.foundation.torch_private import called_operators, read_calls
from piecework.ops.norms import add_rms_norm
from piecework.ops.quantize import quantize_dynamic_per_token
from piecework.report.ops import describe_ops
from piecework.spec.compile_options import BackendName

_PACKAGE = """
    from piecework.ops.norms import add_rms_norm
    from piecework.ops.quantize import quantize_dynamic_per_token

    CALLS = []


    def register():
        @add_rms_norm.implement("made_in_place", reuses=("x", "residual"))
        def add(x, residual, weight=None, eps=1e-6, offset=0.0, round_first=True):
            CALLS.append("add_rms_norm")
            normed, total = add_rms_norm.native(x, residual, weight, eps, offset, round_first)
            return x.copy_(normed), residual.copy_(total)

        def supports(x, *args, **kwargs):
            return x.shape[-1] % 16 == 0 or f"hidden size {x.shape[-1]} not a multiple of 16"

        @quantize_dynamic_per_token.implement("made_in_place", supports=supports)
        def quantize(x, dtype=quantize_dynamic_per_token.signature.parameters["dtype"].default):
            CALLS.append("quantize")
            return quantize_dynamic_per_token.native(x, dtype)
"""


class Block(nn.Module):
    """Both arguments of the first norm are dead after it; of the second, the residual is a result."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))
        self.linear = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        normed, total = add_rms_norm(x + 1, residual * 2, self.weight)
        again, _ = add_rms_norm(self.linear(normed), total, self.weight)
        quantized, scale = quantize_dynamic_per_token(again, torch.int8)
        return again, total, quantized, scale


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the package for this process and for the compile's workers."""
    site = tmp_path / "site"
    info = site / "made_in_place-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "made_in_place_kernels.py").write_text(textwrap.dedent(_PACKAGE))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-in-place\nVersion: 1.0\n")
    entry = "[piecework.providers]\nmade_in_place = made_in_place_kernels:register\n"
    (info / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, sys.path)]))
    return site


def test_native_code_calls_a_packages_operators(package: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Block().requires_grad_(False)
    order = "nobody,sgl_kernel,made_in_place,native"
    options = piecework.CompileOptions(providers=piecework.ProviderOrder.parse(order))
    example = (torch.randn(3, 16), torch.randn(3, 16))
    bundle = piecework.compile(
        module, example, dynamic={"rows": piecework.Dim(1, 64)}, options=options, out=tmp_path / "bundle"
    )
    report = describe_ops(bundle)
    assert report.order == order
    sites = [(call.op, call.provider) for call in report.calls]
    assert sites == [
        ("add_rms_norm", "made_in_place"),
        ("add_rms_norm", "native"),
        ("quantize_dynamic_per_token", "made_in_place"),
    ]
    first, second, last = (call.rejected for call in report.calls)
    # providers that another test has loaded into this process are listed as well
    assert {name: why for name, why in first.items() if why != "not in the order of providers"} == {
        "nobody": "no installed package has an entry point 'nobody' in the group 'piecework.providers'",
        "sgl_kernel": "the package sgl_kernel is not installed",
        "native": "made_in_place comes before it",
    }
    assert second["made_in_place"] == "it writes to residual, which the piece or its caller still reads"
    assert list(last) == ["nobody", "sgl_kernel", "native"]
    assert "not sgl_kernel: the package sgl_kernel is not installed" in report.to_text()
    (artifact,) = (bundle.artifact_path(name) for name in bundle.artifacts)
    assert sorted(called_operators(read_calls(artifact))) == [
        "piecework__made_in_place::add_rms_norm",
        "piecework__made_in_place::quantize_dynamic_per_token",
    ]
    model = piecework.load(bundle, weights=module)
    for rows in (1, 5, 64):
        given = torch.randn(rows, 16), torch.randn(rows, 16)
        kept = [tensor.clone() for tensor in given]
        found, expected = model(*given), module(*given)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.float(), b.float(), atol=1.0 if a.dtype == torch.int8 else 1e-5, rtol=1e-5)
        assert all(map(torch.equal, given, kept))
    assert set(sys.modules["made_in_place_kernels"].CALLS) == {"add_rms_norm", "quantize"}
    assert ("provider", "made-in-place", "1.0") in [(f.kind, f.name, f.value) for f in bundle.facts]
    _check_another_process(bundle.path)
    (package / "made_in_place-1.0.dist-info" / "METADATA").write_text("Name: made-in-place\nVersion: 2.0\n")
    with pytest.raises(piecework.StaleBundle, match=r"provider made-in-place: bundle 1\.0, here 2\.0"):
        piecework.load(bundle, weights=module)


def test_why_a_package_does_not_take_a_call(package: Path, tmp_path: Path) -> None:
    options = piecework.CompileOptions(
        backend=BackendName.EAGER,
        providers=piecework.ProviderOrder.parse("quantize_dynamic_per_token=made_in_place,native"),
    )

    class Quantize(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return quantize_dynamic_per_token(x, torch.int8)

    bundle = piecework.compile(
        Quantize(),
        (torch.randn(3, 20),),
        dynamic={"rows": piecework.Dim(1, 64)},
        options=options,
        out=tmp_path / "bundle",
    )
    (call,) = describe_ops(bundle).calls
    assert call.provider == "native"
    assert call.rejected["made_in_place"] == "supports() said: hidden size 20 not a multiple of 16"


def _check_another_process(path: Path) -> None:
    """A process that has imported no op finds the package by itself, and no compiler."""
    code = """
import json, sys, torch, piecework
weights = {"weight": torch.ones(16), "linear.weight": torch.eye(16)}
model = piecework.load(sys.argv[1], weights=weights)
normed, total, *_ = model(torch.ones(2, 16), torch.ones(2, 16))
loaded = [m for m in ("torch._dynamo", "torch._inductor", "sympy") if m in sys.modules]
print(json.dumps([total[0, 0].item(), loaded]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True, timeout=600
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [4.0, []]
