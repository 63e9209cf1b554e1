"""Routing by `_moe_C::topk_softmax`: softmax over all experts, without groups."""

from __future__ import annotations

import torch
from torch import Tensor

from piecework.providers.families.routing import implement_softmax
from piecework.providers.vllm.library import NAME, Operators

_OPERATOR = "_moe_C::topk_softmax"


def register(operators: Operators) -> None:
    """Register the implementation."""
    topk_softmax = operators.find(_OPERATOR)
    parameters = operators.parameters(_OPERATOR)
    if topk_softmax is None or "renormalize" not in parameters:
        return
    nothing = [None] * (len(parameters) - 5)  # later versions: a bias, and which rows are padding

    def kernel(weights: Tensor, experts: Tensor, logits: Tensor, renormalize: bool) -> None:  # noqa: FBT001
        sources = torch.empty_like(experts)  # of no use here
        topk_softmax(weights, experts, sources, logits, renormalize, *nothing)

    implement_softmax(NAME, kernel, device=operators.device)
