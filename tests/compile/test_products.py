"""Products with packed matrices (providers/cpu_common/products.h), built for this machine and for lesser ones."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from piecework.ops.packed import packed_linear, packed_matrices, unpacked_linear, unpacked_matrices
from piecework.providers import cpu_common
from tests.compile.native_kernels import MACHINES, build

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
TOKENS = [1, 2, 3, 5, 6, 7, 8, 9, 17, 40, 130, 521]  # every size of a tile, several shares of tokens, several chunks
DEPTHS = [2, 70, 256, 300]  # in elements: less than a vector, with a rest, two panels, and a rest of them
CROSS = "aarch64-linux-gnu-g++"

SOURCE = f"""
#include "{Path(cpu_common.__file__).resolve().parent}/products.h"

using namespace piecework;

extern "C" __attribute__((visibility("default"))) int32_t multiply_all(int32_t type, const Product* call) {{
  if (type == 0) return multiply<float>(*call);
  if (type == 1) return multiply<BFloat16>(*call);
#if defined(__FLT16_MAX__)
  if (type == 2) return multiply<Half>(*call);
#endif
  return -1;
}}
"""


class Product(ctypes.Structure):
    """`Product` in products.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "matrices", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("x_token", "x_head", "out_token", "out_head")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_heads", "depth", "width")),
        ("num_threads", ctypes.c_int),
    )


Multiply = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


@pytest.fixture(scope="module", params=MACHINES)
def multiply(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Multiply:
    directory = tmp_path_factory.mktemp("products")
    main = directory / "products.cpp"
    main.write_text(SOURCE)
    run = ctypes.CDLL(str(build(main, (), request.param, directory))).multiply_all

    def called(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, H, K]; packed: [H, K, W]; bias: [W]. Result: [T, H, W]."""
        (num_tokens, num_heads, depth), width = x.shape, packed.shape[2]
        out = torch.full((num_tokens, num_heads, width), torch.nan, dtype=x.dtype)
        pointers = (x.data_ptr(), packed.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr())
        strides = (*x.stride()[:2], *out.stride()[:2])
        call = Product(*pointers, *strides, num_tokens, num_heads, depth, width, 2)
        assert run(list(TOLERANCES).index(x.dtype), ctypes.byref(call)) == 1
        return out

    return called


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_products_are_the_same_bits_in_every_batch(multiply: Multiply, dtype: torch.dtype, depth: int) -> None:
    torch.manual_seed(0)
    weights = (torch.randn(3, depth, 64) / depth**0.5).to(dtype)
    packed, bias = packed_matrices(weights), torch.randn(64).to(dtype)
    assert torch.equal(unpacked_matrices(packed), weights)
    wide = torch.randn(max(TOKENS), 3, depth + 6).to(dtype)
    x = wide[:, :, 3:-3]
    wanted = torch.einsum("thk,hkw->thw", x.double(), weights.double()) + bias.double()
    found = multiply(x, packed, bias)
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    for tokens in TOKENS:
        assert torch.equal(multiply(x[-tokens:], packed, bias), found[-tokens:])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_linear_weight_is_packed_as_a_matrix(dtype: torch.dtype) -> None:
    weight = torch.randn(96, 70).to(dtype)
    packed = packed_linear(weight)
    assert torch.equal(packed.view(1, 70, 96), packed_matrices(weight.t().contiguous().unsqueeze(0)))
    assert torch.equal(unpacked_linear(packed), weight)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["-march=armv8.2-a"], ["-march=armv8.6-a+sve+bf16"]], ids=["neon", "sve_bf16"])
def test_arm_compilers_take_the_kernels(tmp_path: Path, flags: list[str]) -> None:
    """They are not run; pieces have the products with fused multiply-adds written out."""
    if shutil.which(CROSS) is None:
        pytest.skip(f"no {CROSS}")
    main = tmp_path / "products.cpp"
    main.write_text("#define PIECEWORK_WRITTEN_FMA\n" + SOURCE)
    providers = Path(cpu_common.__file__).resolve().parent.parent
    for source in (main, providers / "cpu_attention" / "attention.cpp", providers / "cpu_mla" / "mla.cpp"):
        types = [f"-DPIECEWORK_{name}" for name in ("FLOAT32", "BFLOAT16", "FLOAT16")]
        command = [CROSS, "-std=c++17", "-O1", "-fopenmp", "-fsyntax-only", *flags, *types, str(source)]
        assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""
