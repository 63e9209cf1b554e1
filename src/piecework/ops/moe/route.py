"""`piecework::moe_route`: from a router's logits to each token's experts and their weights.

Covers softmax and sigmoid routers, choice within groups (DeepSeek-V2, arXiv:2405.04434) and a bias that balances the
load without changing weights (DeepSeek-V3, arXiv:2412.19437).

Shape suffixes: T tokens, E experts, G groups of them, k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from piecework.ops.ir.inputs import Draw
from piecework.ops.ir.op import op


def _inputs(draw: Draw) -> Sequence[Any]:
    experts, groups, top_groups = draw.choose(((8, 1, 1), (60, 1, 1), (64, 8, 3), (32, 4, 4)))
    scoring = draw.choose(("softmax", "sigmoid", "softmax"))
    bias = draw.choose((None, draw.distinct(1, experts).float().flatten() / 1024))
    return (
        draw.distinct(draw.rows, experts),
        draw.choose((2, 6, 1)),
        scoring,
        draw.choose((True, False)),
        bias,
        groups,
        top_groups,
        draw.choose((1.0, 2.5)),
    )


class Routing(NamedTuple):
    """What `moe_route` takes besides logits: what implementations of it are given, `flattened`."""

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    bias: Tensor | None = None
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


@op("piecework::moe_route", inputs=_inputs, tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5})
def moe_route(
    logits: Tensor,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,  # noqa: FBT001, FBT002  an operator's argument
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose experts by their scores; all arithmetic is in float32.

    Args:
        logits: [T, E], float32 | bfloat16 | float16.
        top_k: experts per token, 1 to E.
        scoring: "softmax" over all experts, or "sigmoid" of each logit.
        renormalize: whether a token's weights are divided by their sum.
        bias: [E] float32, added to the scores for the choice and not for the weights; or None.
        num_groups: divides E; experts are in as many groups, of neighbours.
        top_groups: a token's experts are of as many groups: those with the best expert, or with a bias the best two.
        scale: factor of the weights, after they are renormalized.

    Returns:
        weights [T, k] float32 and experts [T, k] int64, the best rated first.
    """
    wide = logits.float()
    scores = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()
    rated = scores if bias is None else scores + bias
    if top_groups < num_groups:
        rated = _within_groups(rated, num_groups=num_groups, top_groups=top_groups, biased=bias is not None)
    experts = torch.topk(rated, top_k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be zero
    return weights * scale, experts


def _within_groups(rated: Tensor, *, num_groups: int, top_groups: int, biased: bool) -> Tensor:
    """Return the ratings [T, E] with those outside of a token's best groups too low to be chosen."""
    grouped = rated.unflatten(-1, (num_groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1) if biased else grouped.amax(-1)
    chosen = torch.topk(best, top_groups, dim=-1).indices
    allowed = torch.zeros_like(best, dtype=torch.bool).scatter(-1, chosen, True)
    masked: Tensor = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
    return masked
