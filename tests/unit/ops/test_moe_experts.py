"""Routed experts against a loop over tokens: any choice of experts, in any order, with any weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from piecework.ops.moe.experts import moe_experts
from piecework.ops.opaque import implementation

HIDDEN, INTERMEDIATE, EXPERTS = 12, 8, 6


def make(num_tokens: int, num_chosen: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:num_chosen] for _ in range(num_tokens)])
    return [
        torch.randn(num_tokens, HIDDEN, generator=g).to(dtype),
        ids,
        torch.rand(num_tokens, num_chosen, generator=g),
        torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=g).to(dtype),
        torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=g).to(dtype),
    ]


def by_token(hidden: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, row in enumerate(ids.tolist()):
        for place, expert in enumerate(row):
            gate, up = (gate_up[expert].double() @ hidden[token].double()).chunk(2)
            rows[token] += weights[token, place].double() * (down[expert].double() @ (silu(gate) * up))
    return rows


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("num_chosen", [1, 3, EXPERTS])
def test_equals_the_loop_over_tokens(num_tokens: int, num_chosen: int) -> None:
    args = make(num_tokens, num_chosen)
    torch.testing.assert_close(moe_experts.check(*args).double(), by_token(*args), atol=1e-4, rtol=1e-5)


def test_bfloat16_is_as_close_as_its_rounding() -> None:
    args = make(9, 2, dtype=torch.bfloat16)
    out = moe_experts.check(*args)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), by_token(*args), atol=0.2, rtol=3e-2)


def test_tokens_of_one_expert_only() -> None:
    hidden, _, weights, gate_up, down = make(5, 1)
    ids = torch.full((5, 1), EXPERTS - 1)
    out = moe_experts.check(hidden, ids, weights, gate_up, down)
    torch.testing.assert_close(out.double(), by_token(hidden, ids, weights, gate_up, down), atol=1e-4, rtol=1e-5)


def test_no_tokens() -> None:
    _, _, _, gate_up, down = make(1, 2)
    ids, weights = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)
    assert moe_experts.check(torch.empty(0, HIDDEN), ids, weights, gate_up, down).shape == (0, HIDDEN)


def test_a_token_has_the_same_result_in_any_batch() -> None:
    hidden, ids, weights, gate_up, down = make(17, 3)
    together = moe_experts(hidden, ids, weights, gate_up, down)
    alone = [moe_experts(hidden[i : i + 1], ids[i : i + 1], weights[i : i + 1], gate_up, down) for i in range(17)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_bundle_finds_it() -> None:
    assert implementation("piecework::moe_experts.default") is moe_experts.function
