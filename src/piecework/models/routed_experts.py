"""A layer of routed and shared experts: the router in plain torch, the experts as one operator.

DeepSeekMoE (arXiv:2401.06066), routed within groups (DeepSeek-V2, arXiv:2405.04434), with a bias for balance
(DeepSeek-V3, arXiv:2412.19437). Parameters are named as transformers names them.

Shape suffixes: T tokens, H hidden size, E experts, G groups of them, k experts per token, I an expert's intermediate
size.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from piecework.bundle.recipes import Concat, Sources, Stack, Take
from piecework.ops.moe import experts as _moe_experts  # noqa: F401  registers piecework::moe_experts
from piecework.spec.latent_config import ExpertRouting


@final
class Router(nn.Module):
    """Chooses each token's experts. Its weight and bias are float32, whatever the model's type.

    Args:
        routing: how.
        hidden_size: H.
    """

    e_score_correction_bias: nn.Parameter | None

    def __init__(self, routing: ExpertRouting, *, hidden_size: int) -> None:
        super().__init__()
        self.routing = routing
        self.weight = nn.Parameter(torch.empty(routing.num_experts, hidden_size, dtype=torch.float32))
        bias = nn.Parameter(torch.zeros(routing.num_experts, dtype=torch.float32)) if routing.biased else None
        self.register_parameter("e_score_correction_bias", bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of tokens [T, H], int64 [T, k], and their weights, float32 [T, k]."""
        routing = self.routing
        logits = linear(hidden.float(), self.weight.float())
        scores = logits.softmax(-1) if routing.scoring == "softmax" else logits.sigmoid()
        rated = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        if routing.top_groups < routing.num_groups:
            rated = self._within_groups(rated)
        weights, experts = torch.topk(rated, routing.top_k, dim=-1, sorted=False)
        if routing.biased:
            weights = scores.gather(1, experts)
        if routing.normalized:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be zero
        return experts, weights * routing.scale

    def _within_groups(self, rated: Tensor) -> Tensor:
        """Return the ratings [T, E] with those outside of a token's best groups too low to be chosen."""
        routing = self.routing
        grouped = rated.unflatten(-1, (routing.num_groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1) if routing.biased else grouped.amax(-1)
        chosen = torch.topk(best, routing.top_groups, dim=-1, sorted=False).indices
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter(1, chosen, True)
        # a softmax's scores are no less than 0; sums of a sigmoid and a bias may be anything
        lowest = float("-inf") if routing.biased else 0.0
        masked: Tensor = grouped.masked_fill(~allowed.unsqueeze(-1), lowest).flatten(-2)
        return masked


@final
class Experts(nn.Module):
    """The weights of routed experts: `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I]."""

    def __init__(self, routing: ExpertRouting, *, hidden_size: int) -> None:
        super().__init__()
        num, size = routing.num_experts, routing.intermediate
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num, hidden_size, size))

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Send tokens [T, H] through their experts [T, k] with weights [T, k]: [T, H]."""
        made: Tensor = torch.ops.piecework.moe_experts(hidden, experts, weights, self.gate_up_proj, self.down_proj)
        return made


@final
class RoutedExperts(nn.Module):
    """Routed experts beside shared ones.

    Args:
        routing: how tokens are routed.
        hidden_size: H.
        shared: what every token goes through, [..., H] -> [..., H].
    """

    def __init__(self, routing: ExpertRouting, *, hidden_size: int, shared: nn.Module) -> None:
        super().__init__()
        self.gate = Router(routing, hidden_size=hidden_size)
        self.experts = Experts(routing, hidden_size=hidden_size)
        self.shared_experts = shared

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what the experts make of tokens [T, H]: [T, H]."""
        routed: Tensor = self.experts(hidden, *self.gate(hidden))
        shared: Tensor = self.shared_experts(hidden)
        return routed + shared


def expert_sources(experts: Experts, *, name: str) -> Sources:
    """Say how the stacked weights of experts, a module of that qualified name, are made of a checkpoint's."""
    num_experts, both, hidden_size = experts.gate_up_proj.shape
    size = both // 2
    gate = Take(f"{name}.*.gate_proj.weight", (size, hidden_size))
    up = Take(f"{name}.*.up_proj.weight", (size, hidden_size))
    down = Take(f"{name}.*.down_proj.weight", (hidden_size, size))
    return {
        f"{name}.gate_up_proj": Stack(Concat((gate, up)), num_experts, whole=f"{name}.gate_up_proj"),
        f"{name}.down_proj": Stack(down, num_experts, whole=f"{name}.down_proj"),
    }
