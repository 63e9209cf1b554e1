"""Triton's kernels against the native functions, under its interpreter or on a GPU; skipped without Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from piecework.ops.catalogue import CHOSEN
from piecework.providers.discovery import load_providers
from tests.unit.ops.ir_cases import SEEDS, assert_close

_INSTALLED = importlib.util.find_spec("triton") is not None
_KERNELS = {"rms_norm", "add_rms_norm", "layer_norm", "silu_mul", "gelu_mul", "rotary", "rotate_pairs",
            "quantize_static_fp8", "quantize_dynamic_per_token", "quantize_group_fp8"}  # fmt: skip


def compare(device: str, report: Callable[[str], None] = print) -> None:
    """Run every kernel of the provider on the generated cases that it supports."""
    assert load_providers(["triton"]).absent == {}
    ops = [op for op in CHOSEN if "triton" in op.implementations]
    assert {op.short_name for op in ops} == _KERNELS
    for op in ops:
        compared = 0
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for seed in SEEDS:
                args = op.make_inputs(seed, dtype=dtype, device=device)
                supports = op.implementations["triton"].supports
                if supports is not None and supports(*args) is not True:
                    continue
                compared += 1
                assert_close(op, op.check(*args, provider="triton"), op.native(*args), dtype=dtype)
        assert compared >= 12, op.short_name
        report(f"{op.short_name}: {compared} cases")


@pytest.mark.skipif(not _INSTALLED, reason="no Triton here")
def test_kernels_under_the_interpreter() -> None:
    # a process of its own: Triton decides when a kernel is declared
    code = "from tests.unit.providers.test_triton_provider import compare; compare('cpu')"
    path = os.pathsep.join(entry or "." for entry in sys.path)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=600)


@pytest.mark.gpu
@pytest.mark.skipif(not (_INSTALLED and torch.cuda.is_available()), reason="no Triton, or no GPU, here")
def test_kernels_on_a_gpu() -> None:
    compare("cuda")


@pytest.mark.skipif(_INSTALLED, reason="Triton is here")
def test_without_triton_it_is_absent() -> None:
    assert load_providers(["triton"]).absent == {"triton": "the package triton is not installed"}
