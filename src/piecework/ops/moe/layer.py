"""`piecework::moe_forward`: a mixture of experts whose weights are found by the layer's name.

Each token goes through the `top_k` experts that its router logits choose, and their results are added with the router's
weights (Shazeer et al. 2017, arXiv:1701.06538; as in Mixtral and Qwen-MoE). `moe_forward_shared` gives beside it what
the shared experts make of every token (DeepSeekMoE, arXiv:2401.06066; Qwen2-MoE's gate), for the caller to add.

Shape suffixes: T tokens, H hidden size, E experts, k experts per token, I an expert's intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from piecework.ops.ir.declared_calls import DynamicSizes
from piecework.ops.ir.forward_context import has_running_context, layer_state
from piecework.ops.ir.layer import LayerNameType
from piecework.ops.ir.opaque_op import opaque_op
from piecework.ops.moe.experts import gated_mlp, gated_mlp_call, moe_experts


class Scoring(Enum):
    """How router logits become weights."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


@dataclass(frozen=True)
class MoeWeights:
    """What the forward context holds for a layer of routed experts.

    Attributes:
        gate_up: [E, 2I, H], each expert's gate projection on top of its up projection.
        down: [E, H, I].
        top_k: experts per token, 1 to E.
        renormalize: whether a token's weights are divided by their sum.
        scoring: softmax over all experts, or a sigmoid of each logit.
    """

    gate_up: Tensor
    down: Tensor
    top_k: int
    renormalize: bool = True
    scoring: Scoring = Scoring.SOFTMAX


@dataclass(frozen=True)
class SharedMoeWeights:
    """What the forward context holds for a layer of routed and shared experts.

    Attributes:
        routed: the routed experts.
        gate_up: [2I, H], the shared experts' gate projection on top of their up projection.
        down: [H, I] of the shared experts.
        gate: [1, H], a sigmoid gate on the shared experts' result, or None.
    """

    routed: MoeWeights
    gate_up: Tensor
    down: Tensor
    gate: Tensor | None = None


@opaque_op("piecework::moe_forward")
def moe_forward(hidden: Tensor, router_logits: Tensor, layer: LayerNameType) -> Tensor:
    """Send each token through its experts.

    Args:
        hidden: [T, H], dtype of the weights.
        router_logits: [T, E].
        layer: the layer whose `MoeWeights` are used.

    Returns:
        [T, H], contiguous, dtype of `hidden`; weights and sums over experts are in float32.

    Raises OpError outside of a forward context, and where it has no such layer.
    """
    return routed_experts(hidden, router_logits, layer_state(layer, MoeWeights))


@moe_forward.fake
def _moe_forward_fake(hidden: Tensor, router_logits: Tensor, layer: LayerNameType) -> Tensor:
    return hidden.new_empty(hidden.shape)


@moe_forward.calls
def _moe_forward_calls(
    sizes: DynamicSizes, hidden: Tensor, router_logits: Tensor, layer: LayerNameType
) -> Iterator[Any]:
    if has_running_context():  # else nobody knows the layer's sizes before it runs
        weights = layer_state(layer, MoeWeights)
        yield gated_mlp_call(sizes, hidden, weights.gate_up, rows=hidden.shape[0] * weights.top_k)


@opaque_op("piecework::moe_forward_shared")
def moe_forward_shared(hidden: Tensor, router_logits: Tensor, layer: LayerNameType) -> tuple[Tensor, Tensor]:
    """Send each token through its experts, and through the shared ones; takes what `moe_forward` takes.

    Returns:
        what the shared experts gave and what the routed ones gave, both [T, H]; their sum is the layer's result.

    Raises OpError outside of a forward context, and where it has no layer of that name with shared experts.
    """
    weights = layer_state(layer, SharedMoeWeights)
    return shared_experts(hidden, weights), routed_experts(hidden, router_logits, weights.routed)


@moe_forward_shared.fake
def _moe_forward_shared_fake(hidden: Tensor, router_logits: Tensor, layer: LayerNameType) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)


@moe_forward_shared.calls
def _moe_forward_shared_calls(
    sizes: DynamicSizes, hidden: Tensor, router_logits: Tensor, layer: LayerNameType
) -> Iterator[Any]:
    if has_running_context():
        weights = layer_state(layer, SharedMoeWeights)
        yield gated_mlp_call(sizes, hidden, weights.gate_up, rows=hidden.shape[0])
        yield gated_mlp_call(sizes, hidden, weights.routed.gate_up, rows=hidden.shape[0] * weights.routed.top_k)


def routed_experts(hidden: Tensor, router_logits: Tensor, weights: MoeWeights) -> Tensor:
    """Send tokens [T, H] through the experts that `router_logits` [T, E] choose: [T, H]."""
    factors, experts = choose_experts(router_logits, weights)
    result: Tensor = moe_experts.function(hidden, experts, factors, weights.gate_up, weights.down)
    return result


def choose_experts(router_logits: Tensor, weights: MoeWeights) -> tuple[Tensor, Tensor]:
    """Return each token's experts and their weights: float32 [T, k] and int64 [T, k], the largest first."""
    logits = router_logits.float()
    scores = logits.softmax(-1) if weights.scoring is Scoring.SOFTMAX else logits.sigmoid()
    factors, experts = scores.topk(weights.top_k, dim=-1)
    if weights.renormalize:
        factors = factors / (factors.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be zero
    return factors, experts


def shared_experts(hidden: Tensor, weights: SharedMoeWeights) -> Tensor:
    """Send tokens [T, H] through the shared experts, and their gate where there is one: [T, H]."""
    result = gated_mlp(hidden, weights.gate_up, weights.down)
    return result if weights.gate is None else torch.sigmoid(linear(hidden, weights.gate)) * result
