"""FlashInfer's functions; sgl-kernel's norms, activations and rotary embedding have the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

CALLS: list[tuple[str, tuple[Any, ...]]] = []


def _note(name: str, *args: Any) -> None:
    CALLS.append((name, tuple(tuple(a.shape) if isinstance(a, Tensor) else a for a in args)))


def _normed(x: Tensor, weight: Tensor, eps: float, bias: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (weight.float() + bias)


def rmsnorm(input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None) -> Tensor:
    _note("rmsnorm", input, weight, eps)
    assert input.dim() == 2
    return _normed(input, weight, eps, 0.0).to(input.dtype)


def gemma_rmsnorm(input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None) -> Tensor:
    _note("gemma_rmsnorm", input, weight, eps)
    return _normed(input, weight, eps, 1.0).to(input.dtype)


def fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:
    _note("fused_add_rmsnorm", input, residual, weight, eps)
    residual.add_(input)
    input.copy_(_normed(residual, weight, eps, 0.0))


def gemma_fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:
    _note("gemma_fused_add_rmsnorm", input, residual, weight, eps)
    residual.add_(input)
    input.copy_(_normed(residual, weight, eps, 1.0))


def _layernorm(input: Tensor, gemma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:
    _note("layernorm", input, gemma, beta, eps)
    assert (input.dtype, gemma.dtype, beta.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    return torch.layer_norm(input.float(), input.shape[-1:], gemma, beta, eps).to(input.dtype)


norm = SimpleNamespace(layernorm=_layernorm)


def _gated(name: str, input: Tensor, out: Tensor | None, active: Any) -> Tensor:
    _note(name, input, out)
    assert input.is_contiguous()
    gate, up = input.chunk(2, dim=-1)
    return out.copy_(active(gate.float()) * up.float())


def silu_and_mul(input: Tensor, out: Tensor | None = None) -> Tensor:
    assert input.shape[-1] // 2 * input.element_size() % 16 == 0
    return _gated("silu_and_mul", input, out, silu)


def gelu_and_mul(input: Tensor, out: Tensor | None = None) -> Tensor:
    assert input.shape[-1] // 2 * input.element_size() % 16 == 0
    return _gated("gelu_and_mul", input, out, gelu)


def gelu_tanh_and_mul(input: Tensor, out: Tensor | None = None) -> Tensor:
    return _gated("gelu_tanh_and_mul", input, out, lambda x: gelu(x, approximate="tanh"))


def apply_rope_with_cos_sin_cache_inplace(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> None:
    _note("rope", positions, query, key, head_size, cos_sin_cache, is_neox)
    assert cos_sin_cache.dtype == torch.float32
    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    for tensor in (query, key):
        heads = tensor.view(tensor.shape[0], -1, head_size)
        parts = heads.chunk(2, dim=-1) if is_neox else (heads[..., ::2], heads[..., 1::2])
        a, b = (part.float() for part in parts)
        parts[0].copy_(a * cos - b * sin)
        parts[1].copy_(b * cos + a * sin)


def _fused_topk_deepseek(
    scores: Tensor,
    bias: Tensor,
    n_group: int,
    topk_group: int,
    topk: int,
    routed_scaling_factor: float,
    topk_values: Tensor,
    topk_indices: Tensor,
) -> None:
    _note("fused_topk_deepseek", scores, bias, n_group, topk_group, topk, routed_scaling_factor)
    assert scores.dtype == bias.dtype == topk_values.dtype
    assert topk_indices.dtype == torch.int32
    chances = scores.sigmoid()
    rated = chances + bias
    groups = rated.view(len(scores), n_group, -1)
    best = groups.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
    allowed = torch.zeros(len(scores), n_group, dtype=torch.bool).scatter(-1, best, True)
    masked = groups.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
    chosen = masked.topk(topk, dim=-1).indices
    weights = chances.gather(-1, chosen)
    topk_values.copy_(weights / weights.sum(-1, keepdim=True) * routed_scaling_factor)
    topk_indices.copy_(chosen)


fused_moe = SimpleNamespace(fused_topk_deepseek=_fused_topk_deepseek)
