"""vLLM's operators that its builds for CPUs lack, with the schemas of several versions; they compute by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from piecework.ops.norms import rms_norm

CALLS: list[str] = []
_LIBRARIES: list[torch.library.Library] = []
NORMS = (
    "rms_norm(Tensor! out, Tensor input, Tensor weight, float epsilon) -> ()",
    "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()",
)
LATER = (
    "static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
    "dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
    "per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
    "float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()",
    "topk_softmax(Tensor! topk_weights, Tensor! topk_indices, Tensor! token_expert_indices, Tensor gating_output, "
    "bool renormalize, Tensor? bias, Tensor? is_padding) -> ()",
)
EARLIER = (
    "static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale) -> ()",
    "dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
    "per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
    "float fp8_min, float fp8_max, bool scale_ue8m0) -> ()",
    "topk_softmax(Tensor! topk_weights, Tensor! topk_indices, Tensor! token_expert_indices, Tensor gating_output, "
    "bool renormalize) -> ()",
)
EARLIEST = (
    "static_scaled_fp8_quant() -> ()",
    "topk_softmax(Tensor! topk_weights, Tensor! topk_indices, Tensor! token_expert_indices, Tensor gating_output) "
    "-> ()",
)


def define(*schemas: str) -> None:
    """Register operators as vLLM's libraries do, for a CPU."""
    kernels = {
        "rms_norm": _rms_norm,
        "fused_add_rms_norm": _fused_add_rms_norm,
        "static_scaled_fp8_quant": _static,
        "dynamic_per_token_scaled_fp8_quant": _per_token,
        "per_token_group_fp8_quant": _group,
        "topk_softmax": _topk_softmax,
    }
    for schema in schemas:
        name = schema.partition("(")[0]
        library = torch.library.Library("_moe_C" if name == "topk_softmax" else "_C", "FRAGMENT")
        library.define(schema)
        library.impl(name, kernels[name], "CPU")
        _LIBRARIES.append(library)


def _rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    CALLS.append("rms_norm")
    out.copy_(rms_norm.native(x, weight, eps, 0.0, True))


def _fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    CALLS.append("fused_add_rms_norm")
    residual.add_(x)
    x.copy_(rms_norm.native(residual, weight, eps, 0.0, False))


def _fp8(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def _static(out: Tensor, x: Tensor, scale: Tensor, group_shape: object = None) -> None:
    CALLS.append("static_scaled_fp8_quant")
    assert group_shape is None
    assert x.dim() == 2
    out.copy_(_fp8(x.float() * (1 / scale)))


def _per_token(out: Tensor, x: Tensor, scale: Tensor, scale_ub: Tensor | None) -> None:
    CALLS.append("dynamic_per_token_scaled_fp8_quant")
    assert scale_ub is None
    assert scale.shape == (len(x), 1)
    scale.copy_((x.float().abs().amax(-1, keepdim=True) / 448).clamp_min(1 / (448 * 512)))
    out.copy_(_fp8(x.float() / scale))


def _group(
    x: Tensor, out: Tensor, scale: Tensor, group_size: int, eps: float, low: float, high: float, *flags: bool
) -> None:
    CALLS.append("per_token_group_fp8_quant")
    assert (low, high, any(flags), scale.dim()) == (-448.0, 448.0, False, 2)
    groups = x.float().unflatten(-1, (-1, group_size))
    scale.copy_(groups.abs().amax(-1).clamp_min(eps) / high)
    out.copy_(_fp8(groups / scale.unsqueeze(-1)).flatten(-2))


def _topk_softmax(
    weights: Tensor, ids: Tensor, sources: Tensor, logits: Tensor, renormalize: bool, *nothing: object
) -> None:
    CALLS.append("topk_softmax")
    assert (ids.dtype, sources.dtype, logits.dtype) == (torch.int32, torch.int32, torch.float32)
    assert not any(nothing)
    best = logits.softmax(-1).topk(ids.shape[-1], dim=-1)
    weights.copy_(best.values / best.values.sum(-1, keepdim=True) if renormalize else best.values)
    ids.copy_(best.indices)
