"""Routing by `fused_moe.fused_topk_deepseek`: sigmoids with a bias, within groups, renormalized (DeepSeek-V3)."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from piecework.ops.ir.values import flattened
from piecework.ops.moe.route import Routing, moe_route
from piecework.providers.families.conditions import first_of, of_types, on_device
from piecework.providers.flashinfer.norms import NAME

_MOST_CHOSEN = 8
_MOST_EXPERTS = 384
_MOST_OF_A_GROUP = 32
_MOST_OF_CHOSEN_GROUPS = 128


def register(package: ModuleType) -> None:
    """Register the implementation, where this version has the kernel."""
    fused_topk = getattr(getattr(package, "fused_moe", None), "fused_topk_deepseek", None)
    if fused_topk is None:
        return

    @flattened
    def supports(logits: Tensor, routing: Routing) -> bool | str:
        if routing.scoring != "sigmoid" or routing.bias is None or not routing.renormalize:
            return "the kernel scores by sigmoid with a bias and renormalizes, the call does not"
        return first_of(
            on_device(("cuda",), logits),
            of_types((torch.float32, torch.bfloat16, torch.float16), logits),
            _why_not_sizes(logits.shape[-1], routing.top_k, routing.num_groups, routing.top_groups),
        )

    @moe_route.implement(NAME, supports=supports)
    @flattened
    def route(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        weights = torch.empty((logits.shape[0], routing.top_k), dtype=torch.float32, device=logits.device)
        experts = torch.empty((logits.shape[0], routing.top_k), dtype=torch.int32, device=logits.device)
        if logits.shape[0]:
            # scores, bias and weights have one type in the kernel
            scores = logits.float().contiguous()
            top_k, _, _, bias, num_groups, top_groups, scale = routing
            fused_topk(scores, bias, num_groups, top_groups, top_k, scale, weights, experts)
        return weights, experts.long()


def _why_not_sizes(experts: int, top_k: int, num_groups: int, top_groups: int) -> str:
    if top_k > _MOST_CHOSEN:
        return f"{top_k} experts per token, the kernel chooses up to {_MOST_CHOSEN}"
    if num_groups == 1:
        return f"{experts} experts, the kernel takes up to {_MOST_EXPERTS}" if experts > _MOST_EXPERTS else ""
    each = experts // num_groups
    if each > _MOST_OF_A_GROUP or each * top_groups > _MOST_OF_CHOSEN_GROUPS:
        return f"groups of {each} experts, {top_groups} of them chosen: more than the kernel takes"
    return "" if top_groups * num_groups >= top_k else f"{top_k} experts of {top_groups} groups"
