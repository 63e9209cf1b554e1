"""Routing by `_moe_C::topk_softmax`: softmax over all experts, without groups. Its logits are made float32, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from piecework.ops.moe_route import moe_route
from piecework.providers.families.conditions import first_of, of_types, on_device
from piecework.providers.families.routing import why_not_plain_softmax
from piecework.providers.vllm.library import NAME, Operators

_OPERATOR = "_moe_C::topk_softmax"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register(operators: Operators) -> None:
    """Register the implementation."""
    topk_softmax = operators.find(_OPERATOR)
    parameters = operators.parameters(_OPERATOR)
    if topk_softmax is None or "renormalize" not in parameters:
        return
    nothing = [None] * (len(parameters) - 5)  # later versions: a bias, and which rows are padding

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
            on_device((operators.device,), logits),
            of_types(_DTYPES, logits),
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
            sources = torch.empty_like(experts)  # of no use here
            topk_softmax(weights, experts, sources, logits.float().contiguous(), renormalize, *nothing)
        return weights if scale == 1.0 else weights * scale, experts.long()
