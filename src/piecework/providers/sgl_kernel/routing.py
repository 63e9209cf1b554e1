"""Routing by `topk_softmax`: softmax over all experts, without groups."""

from __future__ import annotations

import inspect
from types import ModuleType

import torch
from torch import Tensor

from piecework.ops.moe_route import moe_route
from piecework.providers.families.conditions import first_of, of_types, on_device
from piecework.providers.families.routing import why_not_plain_softmax
from piecework.providers.sgl_kernel.quantize import NAME


def register(package: ModuleType) -> None:
    """Register the implementation, where this version's kernel can renormalize; older ones had other parameters."""
    topk_softmax = getattr(package, "topk_softmax", None)
    if topk_softmax is None or "renormalize" not in inspect.signature(topk_softmax).parameters:
        return

    def supports(
        logits: Tensor,
        top_k: int,
        scoring: str = "softmax",
        renormalize: bool = True,  # noqa: FBT001, FBT002  the op's
        bias: Tensor | None = None,
        num_groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
    ) -> bool | str:
        return first_of(
            on_device(("cuda",), logits),
            of_types((torch.float32, torch.bfloat16, torch.float16), logits),
            why_not_plain_softmax(scoring, bias, num_groups, top_groups),
        )

    @moe_route.implement(NAME, supports=supports)
    def route(
        logits: Tensor,
        top_k: int,
        scoring: str = "softmax",
        renormalize: bool = True,  # noqa: FBT001, FBT002  the op's
        bias: Tensor | None = None,
        num_groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        weights = torch.empty((logits.shape[0], top_k), dtype=torch.float32, device=logits.device)
        experts = torch.empty((logits.shape[0], top_k), dtype=torch.int32, device=logits.device)
        if logits.shape[0]:
            topk_softmax(weights, experts, logits.float().contiguous(), renormalize=renormalize)
        return weights if scale == 1.0 else weights * scale, experts.long()
