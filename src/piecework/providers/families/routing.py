"""Routers of packages: what their plain softmax can't do."""

from __future__ import annotations

from torch import Tensor


def why_not_plain_softmax(scoring: str, bias: Tensor | None, num_groups: int, top_groups: int) -> str:
    """Return why a call is no softmax over all experts, or ""."""
    if scoring != "softmax":
        return f"the kernel scores by softmax, the call by {scoring}"
    if bias is not None:
        return "the call has a bias that is not in the weights"
    return "the call chooses among groups of experts" if top_groups < num_groups else ""
