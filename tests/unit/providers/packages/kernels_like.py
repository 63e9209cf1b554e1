"""The package `kernels`, with the repositories' modules that it would download."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.nn.functional import gelu, silu

from piecework.ops.norms import rms_norm
from tests.unit.providers.packages.flashinfer_like import CALLS, _gated, _note  # noqa: F401


def _activation(name: str, active: Any) -> Any:
    return lambda out, x: _gated(name, x, out, active)


def rms_norm_forward(x: Tensor, w: Tensor | None, eps: float, offset: float, casting_mode: str, row_mode: Any) -> Any:
    _note("rms_norm_forward", x, w, eps, offset, casting_mode, row_mode)
    return rms_norm.native(x, w, eps, offset, casting_mode == "llama"), "and what the backward pass needs"


def apply_rotary(x1: Tensor, x2: Tensor, cos: Tensor, sin: Tensor, out1: Tensor, out2: Tensor, conj: bool) -> None:
    _note("apply_rotary", x1, x2, cos, sin, conj)
    assert x1.dtype == x2.dtype == cos.dtype == sin.dtype == out1.dtype
    a, b = x1.float(), x2.float()
    made = (a * cos.float() - b * sin.float()).to(x1.dtype), (b * cos.float() + a * sin.float()).to(x1.dtype)
    out1.copy_(made[0])
    out2.copy_(made[1])


def get_kernel(repo_id: str, *, version: int) -> ModuleType:
    _note("get_kernel", repo_id, version)
    module = ModuleType(repo_id)
    match repo_id, version:
        case "kernels-community/activation", 1:
            module.silu_and_mul = _activation("silu_and_mul", silu)
            module.gelu_and_mul = _activation("gelu_and_mul", gelu)
            module.gelu_tanh_and_mul = _activation("gelu_tanh_and_mul", partial(gelu, approximate="tanh"))
        case "kernels-community/liger-kernels", 3:
            module.rms_norm = ModuleType("rms_norm")
            module.rms_norm.rms_norm_forward = rms_norm_forward
        case "kernels-community/rotary", 2:
            module.apply_rotary = apply_rotary
        case _:
            raise FileNotFoundError(f"no kernel {repo_id}")
    return module
