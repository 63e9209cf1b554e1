"""Providers of packages for GPUs, on stand-ins of the packages: how arguments are handed over, and why not.

Each runs in a process of its own, because what is registered stays registered.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from piecework.ops.catalogue import CHOSEN
from piecework.ops.ir.op import IrOp
from piecework.ops.norms import rms_norm
from piecework.providers.discovery import load_providers
from tests.choice import slow_but
from tests.unit.ops.ir_cases import SEEDS, assert_close

COMMON = {"rms_norm", "silu_mul", "gelu_mul", "rotary"}
OPS = {
    "flashinfer": COMMON | {"add_rms_norm", "layer_norm", "moe_route"},
    "sgl_kernel": COMMON | {"add_rms_norm", "quantize_static_fp8", "quantize_group_fp8", "moe_route"},
    "kernels": COMMON,
}
ROUTE = (6, "sigmoid", True, torch.zeros(64), 8, 3)


def on_gpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with tensors that say they are on a GPU, with the same strides, and have no data."""
    with FakeTensorMode():
        return tuple(
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda") if isinstance(a, Tensor) else a
            for a in args
        )


def compare(provider: str, report: Callable[[str], None] = print) -> None:
    """Run every implementation on the generated cases that it would take on a GPU."""
    assert load_providers([provider]).absent == {}
    ops = [op for op in CHOSEN if provider in op.implementations]
    assert {op.short_name for op in ops} == OPS[provider]
    for op in ops:
        made = op.implementations[provider]
        compared = 0
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for args in cases(op, dtype):
                assert "the call is on cpu" in str(made.supports(*args)) or made.supports(*args) is not True
                if made.supports(*on_gpu(args)) is not True:
                    continue
                compared += 1
                expected = op.native(*args)
                assert_close(op, op.check(*args, provider=provider), expected, dtype=dtype)
        assert compared >= 4, (op.short_name, compared)
        report(f"{op.short_name}: {compared} cases")


def cases(op: IrOp, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Return the generated cases, and some that few of those are."""
    made = [op.make_inputs(seed, dtype=dtype) for seed in range(2 * len(SEEDS))]
    if op.short_name in {"rms_norm", "add_rms_norm"}:
        for args in list(made):
            *tensors, weight, eps, _, _ = args
            if weight is not None:
                made += [(*tensors, weight.to(tensors[0].dtype), eps, offset, False) for offset in (0.0, 1.0)]
    if op.short_name == "layer_norm":
        made += [(x, w.float(), b.float(), eps) for x, w, b, eps in made if w is not None and b is not None]
    if op.short_name == "moe_route":
        made += [(logits[:, :64], *ROUTE, 2.5) for logits, *_ in made if logits.shape[1] == 64]
    return made


def explain(provider: str) -> None:
    """Print why calls are refused: one line each, "op: reason"."""
    for op in CHOSEN:
        made = op.implementations.get(provider)
        if made is None:
            continue
        found = {made.supports(*on_gpu(args)) for d in (torch.float32, torch.bfloat16) for args in cases(op, d)}
        found |= {made.supports(*op.make_inputs(0, dtype=torch.bfloat16))}
        print("\n".join(f"{op.short_name}: {why}" for why in sorted(map(str, found))))


def everything(provider: str) -> None:
    """What a process of its own does with a provider's stand-in."""
    load_providers([provider])
    if provider == "flashinfer":
        look_at_calls(provider)
    if provider == "kernels":
        look_at_the_hub(provider)
    compare(provider)
    print("---")
    explain(provider)


def _run(provider: str, folder: Path, function: str) -> str:
    stand_in = "kernels_like" if provider == "kernels" else f"{provider}_like"
    (folder / f"{provider}.py").write_text(f"from tests.unit.providers.packages.{stand_in} import *\n")
    code = f"from tests.unit.providers import test_package_providers as t; t.{function}({provider!r})"
    path = os.pathsep.join([str(folder), *(entry or "." for entry in sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


REASONS = {
    "flashinfer": """
        rms_norm: the call is on cpu, the kernels run on cuda
        rms_norm: a tensor is float32, the kernel takes bfloat16, float16
        rms_norm: the kernel needs a weight
        rms_norm: the kernel rounds to bfloat16 after the weight, the call before the weight
        layer_norm: the kernel needs a weight and a bias
        layer_norm: a tensor is bfloat16, the kernel takes float32
        silu_mul: gate and up are not the halves of one tensor
        silu_mul: intermediate size 250 not a multiple of 8
        rotary: heads of 80, the kernel has 64, 128, 256, 512
        rotary: 32 of 64 elements of a head are rotated, the kernel does so with whole heads
        moe_route: the kernel scores by sigmoid with a bias and renormalizes, the call does not
    """,
    "sgl_kernel": """
        add_rms_norm: the kernel rounds to bfloat16 after the weight, the call before the weight
        quantize_group_fp8: groups of 64, the kernel has 128
        quantize_group_fp8: a tensor is float32, the kernel takes bfloat16, float16
        moe_route: the kernel scores by softmax, the call by sigmoid
        moe_route: the call has a bias that is not in the weights
    """,
    "kernels": """
        rms_norm: the call is on cpu, the kernels run on cuda
        silu_mul: gate and up are not the halves of one tensor
        rotary: the cosines' type is float32, the rows are bfloat16
    """,
}


@pytest.mark.parametrize("provider", slow_but(OPS, "flashinfer"))
def test_arguments_are_handed_over_and_refusals_have_reasons(provider: str, tmp_path: Path) -> None:
    compared, refused = _run(provider, tmp_path, "everything").split("---\n")
    assert len(compared.splitlines()) == len(OPS[provider])
    found = {line.strip() for line in refused.splitlines()}
    expected = {line.strip() for line in REASONS[provider].strip().splitlines()}
    assert expected <= found, sorted(found)


def look_at_calls(provider: str) -> None:
    """Check what FlashInfer's functions were given, call by call."""
    import flashinfer

    implementations = {op.short_name: op.implementations[provider] for op in CHOSEN if provider in op.implementations}
    run = {name: made.function for name, made in implementations.items()}
    x, residual, weight = torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16(), torch.ones(64).bfloat16()
    run["rms_norm"](x, weight, 1e-5, 1.0, False)
    normed, total = run["add_rms_norm"](x, residual, weight, 1e-5, 0.0, False)
    assert normed is x
    assert total is residual
    both = torch.randn(5, 32).bfloat16()
    run["silu_mul"](*both.chunk(2, dim=-1))
    run["gelu_mul"](*both.chunk(2, dim=-1), "tanh")
    q, k = (torch.randn(1, 7, heads, 64).bfloat16().transpose(1, 2) for heads in (4, 2))
    cos = torch.randn(1, 1, 7, 64).bfloat16()
    rotated = run["rotary"](q, k, cos, cos, True)
    assert not torch.equal(rotated[0], q)
    assert rotated[0].stride() == q.stride()
    run["rms_norm"](x[:0], weight)
    assert flashinfer.CALLS == [
        ("gemma_rmsnorm", ((6, 64), (64,), 1e-5)),
        ("fused_add_rmsnorm", ((6, 64), (6, 64), (64,), 1e-5)),
        ("silu_and_mul", ((5, 32), (5, 16))),
        ("gelu_tanh_and_mul", ((5, 32), (5, 16))),
        ("rope", ((7,), (7, 256), (7, 128), 64, (7, 64), False)),
    ]


def look_at_the_hub(provider: str) -> None:
    """Check that the Hub's kernels are fetched for calls on a GPU only."""
    import kernels

    supports = rms_norm.implementations[provider].supports
    supports(torch.ones(2, 8), torch.ones(8))
    assert kernels.CALLS == []


def fetch_in_vain(provider: str) -> None:
    """Check what happens where the Hub's kernels can't be had."""
    import kernels

    load_providers([provider])
    kernels.get_kernel = None
    why = rms_norm.implementations[provider].supports(*on_gpu((torch.ones(2, 8), torch.ones(8))))
    assert why == "kernels-community/liger-kernels can't be had: TypeError: 'NoneType' object is not callable", why


@pytest.mark.slow
def test_kernels_that_can_not_be_fetched_are_refused_with_the_reason(tmp_path: Path) -> None:
    _run("kernels", tmp_path, "fetch_in_vain")


@pytest.mark.gpu
@pytest.mark.parametrize("provider", OPS)
def test_kernels_on_a_gpu(provider: str) -> None:
    absent = load_providers([provider]).absent
    if absent:
        pytest.skip(absent[provider])
    compared = dict.fromkeys((op.short_name for op in CHOSEN if provider in op.implementations), 0)
    for op in CHOSEN:
        made = op.implementations.get(provider)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for given in cases(op, dtype) if made is not None else ():
                args = tuple(a.cuda() if isinstance(a, Tensor) else a for a in given)
                if made.supports(*args) is True:
                    compared[op.short_name] += 1
                    expected = op.native(*args)
                    assert_close(op, op.check(*args, provider=provider), expected, dtype=dtype)
    assert min(compared.values()) >= 4, compared
