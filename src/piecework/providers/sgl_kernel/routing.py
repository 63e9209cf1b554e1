"""Routing by `topk_softmax`: softmax over all experts, without groups."""

from __future__ import annotations

import inspect
from types import ModuleType

from torch import Tensor

from piecework.providers.families.routing import implement_softmax
from piecework.providers.sgl_kernel.quantize import NAME


def register(package: ModuleType) -> None:
    """Register the implementation, where this version's kernel can renormalize; older ones had other parameters."""
    topk_softmax = getattr(package, "topk_softmax", None)
    if topk_softmax is None or "renormalize" not in inspect.signature(topk_softmax).parameters:
        return

    def kernel(weights: Tensor, experts: Tensor, logits: Tensor, renormalize: bool) -> None:  # noqa: FBT001
        topk_softmax(weights, experts, logits, renormalize=renormalize)

    implement_softmax(NAME, kernel, device="cuda")
