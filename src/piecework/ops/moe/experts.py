"""`piecework::moe_experts`: routed experts whose tokens were chosen before, by a router in a piece.

The weights are arguments, so that a plan binds each layer's own; `layer.py` has operators that find them by a layer's
name. How many tokens an expert has is a matter of values, so this is opaque to compilers.

Shape suffixes: T tokens, H hidden size, E experts, k experts per token, I an expert's intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from piecework.ops.activations import silu_mul
from piecework.ops.ir.declared_calls import DynamicSizes
from piecework.ops.ir.opaque_op import opaque_op

MOE_EXPERTS_OP: Final = "piecework::moe_experts"


@opaque_op(MOE_EXPERTS_OP)
def moe_experts(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Send each token through its experts, and add their results with the router's weights.

    Tokens are sorted by expert, so that each expert in use is one matrix product; how many tokens each has is asked of
    the device once.

    Args:
        hidden: [T, H], float32 | bfloat16 | float16.
        topk_ids: [T, k] int64, 0 to E - 1; the experts of a token, in any order.
        topk_weights: [T, k], what each is multiplied with.
        gate_up: [E, 2I, H], each expert's gate projection on top of its up projection; dtype of `hidden`.
        down: [E, H, I]; dtype of `hidden`.

    Returns:
        [T, H], contiguous, dtype of `hidden`; the sum over a token's experts is in float32.
    """
    num_tokens, num_chosen = topk_ids.shape
    order = topk_ids.flatten().argsort(stable=True)
    counts = topk_ids.flatten().bincount(minlength=gate_up.shape[0]).tolist()
    rows = hidden.index_select(0, order // num_chosen)
    results = torch.empty_like(rows)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            part = slice(start, start + count)
            results[part] = gated_mlp(rows[part], gate_up[expert], down[expert])
            start += count
    # back to the order of tokens, so that each token's sum has the same order whatever the batch
    by_token = torch.empty_like(results).index_copy_(0, order, results).view(num_tokens, num_chosen, hidden.shape[1])
    return torch.bmm(topk_weights.float().unsqueeze(1), by_token.float()).squeeze(1).to(hidden.dtype)


@moe_experts.fake
def _moe_experts_fake(hidden: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return hidden.new_empty(hidden.shape)


@moe_experts.calls
def _moe_experts_calls(
    sizes: DynamicSizes, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor
) -> Iterator[Any]:
    yield gated_mlp_call(sizes, hidden, gate_up, rows=topk_ids.shape[0] * topk_ids.shape[1])


def gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return down(silu(gate(x)) * up(x)) for x [T, H], gate_up [2I, H], down [H, I]: [T, H]."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    result: Tensor = linear(silu_mul(gate, up), down)
    return result


def gated_mlp_call(sizes: DynamicSizes, hidden: Tensor, gate_up: Tensor, *, rows: int) -> Any:
    """Return the declaration of the call that `gated_mlp` makes for up to `rows` rows; gate_up is [..., 2I, H]."""
    both = hidden.new_empty(sizes.dynamic(rows, low=1), gate_up.shape[-2])
    return silu_mul, both.chunk(2, dim=-1)
