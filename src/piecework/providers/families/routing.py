"""Routing by packages' kernels for a plain softmax over all experts, and what such a kernel can't do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from piecework.ops.ir.values import flattened
from piecework.ops.moe.route import Routing, moe_route
from piecework.providers.families.conditions import first_of, of_types, on_device

TopkSoftmax = Callable[[Tensor, Tensor, Tensor, bool], None]
"""Fills weights [T, k], float32, and experts [T, k], int32, from contiguous float32 logits [T, E]."""


def implement_softmax(provider: str, topk_softmax: TopkSoftmax, *, device: str) -> None:
    """Register a kernel as a provider's implementation of `moe_route`. Its logits are made float32, exactly."""

    @flattened
    def supports(logits: Tensor, routing: Routing) -> bool | str:
        return first_of(
            on_device((device,), logits),
            of_types((torch.float32, torch.bfloat16, torch.float16), logits),
            _why_not_plain_softmax(routing),
        )

    @moe_route.implement(provider, supports=supports)
    @flattened
    def route(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        weights = torch.empty((logits.shape[0], routing.top_k), dtype=torch.float32, device=logits.device)
        experts = torch.empty((logits.shape[0], routing.top_k), dtype=torch.int32, device=logits.device)
        if logits.shape[0]:
            topk_softmax(weights, experts, logits.float().contiguous(), routing.renormalize)
        return weights if routing.scale == 1.0 else weights * routing.scale, experts.long()


def _why_not_plain_softmax(routing: Routing) -> str:
    if routing.scoring != "softmax":
        return f"the kernel scores by softmax, the call by {routing.scoring}"
    if routing.bias is not None:
        return "the call has a bias that is not in the weights"
    return "the call chooses among groups of experts" if routing.top_groups < routing.num_groups else ""
