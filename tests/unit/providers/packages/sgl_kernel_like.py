"""sgl-kernel's functions for quantization and routing, beside those that it shares with FlashInfer."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.unit.providers.packages.flashinfer_like import (  # noqa: F401
    CALLS,
    _note,
    apply_rope_with_cos_sin_cache_inplace,
    fused_add_rmsnorm,
    gelu_and_mul,
    gelu_tanh_and_mul,
    gemma_fused_add_rmsnorm,
    gemma_rmsnorm,
    rmsnorm,
    silu_and_mul,
)


def sgl_per_tensor_quant_fp8(input: Tensor, output_q: Tensor, output_s: Tensor, is_static: bool) -> None:
    _note("sgl_per_tensor_quant_fp8", input, output_q, output_s, is_static)
    assert is_static
    output_q.copy_((input.float() * (1.0 / output_s)).clamp(-448, 448).to(torch.float8_e4m3fn))


def sgl_per_token_group_quant_8bit(
    input: Tensor,
    output_q: Tensor,
    output_s: Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool = False,
    enable_v2: bool | None = None,
) -> None:
    _note("sgl_per_token_group_quant_8bit", input, output_q, output_s, group_size, eps, enable_v2)
    assert (fp8_min, fp8_max, scale_ue8m0, output_s.dim()) == (-448.0, 448.0, False, 2)
    groups = input.float().unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1).clamp_min(eps) / fp8_max
    output_s.copy_(scale)
    output_q.copy_((groups * (1.0 / scale.unsqueeze(-1))).clamp(fp8_min, fp8_max).flatten(-2).to(output_q.dtype))


def topk_softmax(
    topk_weights: Tensor,
    topk_ids: Tensor,
    gating_output: Tensor,
    renormalize: bool = False,
    moe_softcapping: float = 0.0,
    correction_bias: Tensor | None = None,
) -> None:
    _note("topk_softmax", topk_weights, topk_ids, gating_output, renormalize)
    assert topk_ids.dtype == torch.int32
    best = gating_output.float().softmax(-1).topk(topk_ids.shape[-1], dim=-1)
    weights = best.values / best.values.sum(-1, keepdim=True) if renormalize else best.values
    topk_weights.copy_(weights)
    topk_ids.copy_(best.indices)
