"""Providers are found by entry points, imported only when they are asked for, and told of when they are absent."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import piecework
from piecework.errors import OpError
from piecework.ops.norms import rms_norm
from piecework.providers.discovery import load_operators, load_providers


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a package that nobody installed on the path: a module, and a dist-info directory with an entry point."""
    (tmp_path / "made_kernels.py").write_text(
        textwrap.dedent(
            """
            from piecework.ops.norms import rms_norm

            CALLS = []


            def register():
                @rms_norm.implement("made_up", supports=lambda x, *args, **kwargs: x.shape[-1] % 16 == 0
                                    or f"hidden size {x.shape[-1]} not a multiple of 16")
                def norm(x, weight=None, eps=1e-6, offset=0.0, round_first=True):
                    CALLS.append(tuple(x.shape))
                    return rms_norm.native(x, weight, eps, offset, round_first)
            """
        )
    )
    info = tmp_path / "made_kernels-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-kernels\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[piecework.providers]\nmade_up = made_kernels:register\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "made_up"


def test_a_package_made_on_the_fly_provides(package: str) -> None:
    assert "made_kernels" not in sys.modules, "nothing was imported before somebody asked"
    with piecework.providers(["rms_norm=made_up,native"]) as order:
        rms_norm(torch.ones(3, 32))
        rms_norm(torch.ones(3, 20))
        choice = order.resolve(rms_norm, (torch.ones(3, 20),))
    assert sys.modules["made_kernels"].CALLS == [(3, 32)]
    assert choice.provider == "native"
    assert choice.rejected[0].why == "supports() said: hidden size 20 not a multiple of 16"
    assert load_providers(["made_up"]).packages == {"made_up": "made-kernels"}
    load_operators(["piecework__made_up.rms_norm.default", "aten.add.Tensor"])


def test_an_absent_provider_is_passed_over_with_a_reason() -> None:
    absent = load_providers(["nobody"]).absent
    assert absent == {"nobody": "no installed package has an entry point 'nobody' in the group 'piecework.providers'"}
    with piecework.providers(["rms_norm=nobody,native"]):
        rms_norm(torch.ones(1, 4))
    with piecework.providers(["rms_norm=nobody"]), pytest.raises(OpError, match="no installed package"):
        rms_norm(torch.ones(1, 4))
    with pytest.raises(OpError, match="run pieces that call the provider nobody"):
        load_operators(["piecework__nobody::rms_norm"])


def test_native_code_looks_for_no_packages() -> None:
    code = """
import sys
import torch, piecework
from piecework.ops.norms import rms_norm
with piecework.providers("native"):
    rms_norm(torch.ones(1, 4))
assert "piecework.providers.aten" not in sys.modules
assert "piecework.providers.triton" not in sys.modules
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
