"""Routing by packages' kernels for a plain softmax over all experts, and what such a kernel can't do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from piecework.ops.moe_route import moe_route
from piecework.providers.families.conditions import first_of, of_types, on_device

TopkSoftmax = Callable[[Tensor, Tensor, Tensor, bool], None]
"""Fills weights [T, k], float32, and experts [T, k], int32, from contiguous float32 logits [T, E]."""


def implement_softmax(provider: str, topk_softmax: TopkSoftmax, *, device: str) -> None:
    """Register a kernel as a provider's implementation of `moe_route`. Its logits are made float32, exactly."""

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
            on_device((device,), logits),
            of_types((torch.float32, torch.bfloat16, torch.float16), logits),
            _why_not_plain_softmax(scoring, bias, num_groups, top_groups),
        )

    @moe_route.implement(provider, supports=supports)
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
            topk_softmax(weights, experts, logits.float().contiguous(), renormalize)
        return weights if scale == 1.0 else weights * scale, experts.long()


def _why_not_plain_softmax(scoring: str, bias: Tensor | None, num_groups: int, top_groups: int) -> str:
    if scoring != "softmax":
        return f"the kernel scores by softmax, the call by {scoring}"
    if bias is not None:
        return "the call has a bias that is not in the weights"
    return "the call chooses among groups of experts" if top_groups < num_groups else ""
