"""vLLM's own kernels against the native functions, where vLLM is installed; and which of its libraries is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import piecework
from piecework.foundation.target import make_target
from piecework.ops.catalogue import CHOSEN
from piecework.ops.ir.selection import choose_implementation
from piecework.ops.norms import Norming, add_rms_norm, rms_norm
from piecework.ops.quantize import quantize_dynamic_per_token
from piecework.providers.discovery import load_providers
from piecework.providers.families.norms import Rounding, probe
from piecework.providers.known import known_provider
from piecework.providers.vllm.library import libraries
from tests.choice import slow_but
from tests.unit.ops.ir_cases import SEEDS, assert_close

WHY_ABSENT = known_provider("vllm").why_absent
needs_vllm = pytest.mark.skipif(bool(WHY_ABSENT), reason=WHY_ABSENT)
ON_CPU = {"rms_norm", "add_rms_norm", "silu_mul", "gelu_mul", "rotary", "quantize_dynamic_per_token"}


def _compare(device: str) -> dict[str, int]:
    """Run every kernel on the generated cases that it supports; return how many those were."""
    assert load_providers(["vllm"]).absent == {}
    compared = {}
    for op in CHOSEN:
        made = op.implementations.get("vllm")
        if made is None:
            continue
        compared[op.short_name] = 0
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for seed in SEEDS:
                args = op.make_inputs(seed, dtype=dtype, device=device)
                if made.supports(*args) is not True:
                    continue
                compared[op.short_name] += 1
                expected = op.native(*args)
                assert_close(op, op.check(*args, provider="vllm"), expected, dtype=dtype)
    return compared


@needs_vllm
def test_kernels_on_a_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this vLLM is built for CUDA")
    compared = _compare("cpu")
    assert set(compared) == ON_CPU
    assert min(compared.values()) >= 6, compared


@pytest.mark.gpu
@needs_vllm
def test_kernels_on_a_gpu() -> None:
    compared = _compare("cuda")
    assert ON_CPU | {"quantize_static_fp8", "quantize_group_fp8", "moe_route"} <= set(compared)
    assert min(compared.values()) >= 6, compared


@needs_vllm
def test_eager_calls_and_reasons() -> None:
    x, weight = torch.randn(3, 64), torch.randn(64)
    with piecework.providers(["rms_norm=vllm,native"]) as order:
        torch.testing.assert_close(rms_norm(x, weight), rms_norm.native(x, weight))
        choice = choose_implementation(order, rms_norm, (x, weight))
        assert choice.provider == "vllm"
        refused = {
            "the kernel adds nothing to the weight, the call 1.0": (x, weight, 1e-6, 1.0),
            "a weight is float32, the rows are bfloat16": (x.bfloat16(), weight),
            "a tensor is not contiguous": (x.t(), weight[:3]),
        }
        for why, args in refused.items():
            choice = choose_implementation(order, rms_norm, args)
            assert choice.provider == "native"
            assert choice.rejected[0].why == f"supports() said: {why}"


@needs_vllm
def test_what_it_writes_to_must_be_dead() -> None:
    with piecework.providers(["add_rms_norm=vllm,native"]) as order:
        choice = choose_implementation(order, add_rms_norm, (torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)))
    assert choice.provider == "native"
    assert choice.rejected[0].why == "it writes to residual, x, which eager code may still read"


@needs_vllm
def test_small_and_zero_rows_in_int8() -> None:
    load_providers(["vllm"])
    x = torch.zeros(4, 48)
    x[1, 3], x[2] = -1e-9, 5.0
    found = quantize_dynamic_per_token.check(x, torch.int8, provider="vllm")
    assert_close(quantize_dynamic_per_token, found, quantize_dynamic_per_token.native(x, torch.int8), dtype=x.dtype)


@needs_vllm
def test_neither_vllm_nor_a_compiler_is_imported() -> None:
    code = """
import sys, torch, piecework
from piecework.ops.norms import Norming, rms_norm
with piecework.providers(["rms_norm=vllm,native"]) as order:
    assert choose_implementation(order, rms_norm, (torch.ones(2, 64), torch.ones(64))).provider == "vllm"
    rms_norm(torch.ones(2, 64), torch.ones(64))
assert not {"vllm", "torch._dynamo", "torch._inductor"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def use_stand_ins(version: str) -> None:
    """Compare operators that builds for CPUs lack, on stand-ins; in a process of its own, since they stay."""
    from tests.unit.providers.packages import vllm_like

    vllm_like.define(*vllm_like.NORMS, *getattr(vllm_like, version))
    compared = _compare("cpu")
    norms = {"rms_norm", "add_rms_norm"}
    if version == "EARLIEST":
        assert set(compared) == norms
    else:
        expected = {"quantize_static_fp8", "quantize_dynamic_per_token", "quantize_group_fp8", "moe_route"}
        assert set(compared) == norms | expected
    assert min(compared.values()) >= 4, compared
    x, weight = torch.ones(2, 8).bfloat16(), torch.ones(8).bfloat16()
    supports, adds = (op.implementations["vllm"].supports for op in (rms_norm, add_rms_norm))
    assert supports(x) == "this version's kernel needs a weight"
    assert supports(x, weight) is True
    assert adds(x, x, weight) == "the kernel rounds to bfloat16 after the weight, the call before the weight"
    if version != "EARLIEST":
        quantizes = quantize_dynamic_per_token.implementations["vllm"].supports
        assert quantizes(x, torch.int8) == "this build of vLLM quantizes to no int8"


@pytest.mark.parametrize("version", slow_but(["LATER", "EARLIER", "EARLIEST"], "LATER"))
def test_operators_of_other_builds_and_versions(tmp_path: Path, version: str) -> None:
    (tmp_path / "vllm.py").write_text("raise AssertionError('vLLM itself was imported')")
    code = f"from tests.unit.providers import test_vllm_provider as t; t.use_stand_ins({version!r})"
    path = os.pathsep.join([str(tmp_path), *(entry or "." for entry in sys.path)])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)


@pytest.mark.parametrize(
    ("files", "flags", "loaded"),
    [
        (["_C", "_C_AVX2", "_C_AVX512"], "avx2 fma", ["_C_AVX2"]),
        (["_C", "_C_AVX2", "_C_AVX512"], "avx512f avx512bw avx512vl avx512dq fma", ["_C_AVX512"]),
        (["_C", "_C_AVX2", "_C_AVX512"], "avx512f avx512bw avx512vl avx512dq fma avx512_bf16", ["_C"]),
        (["_C"], "avx2 fma", ["_C"]),
        (["_C", "_moe_C", "cumem_allocator"], "avx2 fma", ["_C", "_moe_C"]),
        (
            ["_C_stable_libtorch", "_moe_C_stable_libtorch", "_rocm_C"],
            "",
            ["_C_stable_libtorch", "_moe_C_stable_libtorch"],
        ),
        ([], "", []),
    ],
)
def test_the_libraries_are_those_that_vllm_loads(
    tmp_path: Path, files: list[str], flags: str, loaded: list[str]
) -> None:
    for name in files:
        (tmp_path / f"{name}.abi3.so").touch()
    target = make_target("x86_64", system="linux", flags=frozenset(flags.split()))
    assert [path.name.partition(".")[0] for path in libraries(tmp_path, target=target)] == loaded


@pytest.mark.parametrize("rounding", [Rounding.FIRST, Rounding.LAST])
def test_a_kernel_tells_when_it_rounds(rounding: Rounding) -> None:
    first = rounding is Rounding.FIRST
    assert probe(lambda x, w: rms_norm.native(x, w, 1e-6, 0.0, first), device="cpu") is rounding
    x, weight = torch.randn(2, 8).bfloat16(), torch.randn(8).bfloat16()
    assert rounding.conflict(x, Norming(weight, round_first=first)) == ""
    assert rounding.conflict(x, Norming(None, round_first=not first)) == ""
    assert rounding.conflict(x.float(), Norming(weight.float(), round_first=not first)) == ""
    where = ("before", "after") if first else ("after", "before")
    expected = f"the kernel rounds to bfloat16 {where[0]} the weight, the call {where[1]} the weight"
    assert rounding.conflict(x, Norming(weight, round_first=not first)) == expected


def test_a_kernel_that_rounds_otherwise() -> None:
    def coarse(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm.native(x, weight).to(torch.float8_e4m3fn).to(x.dtype)

    assert probe(coarse, device="cpu") is Rounding.OTHER
