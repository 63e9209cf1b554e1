"""Mixture of experts against a loop over tokens and transformers' own blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from piecework import LayerName, OpError, check_ops
from piecework.ops.ir.forward_context import ForwardContext
from piecework.ops.moe.layer import MoeWeights, Scoring, SharedMoeWeights, moe_forward, moe_forward_shared

LAYER = LayerName("model.layers.0.mlp")
HIDDEN, INTERMEDIATE, EXPERTS = 12, 8, 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_weights(*, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> MoeWeights:
    g = generator(seed)
    return MoeWeights(
        gate_up=torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=g).to(dtype),
        down=torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=g).to(dtype),
        **{"top_k": 2, **options},
    )


def make_inputs(num_tokens: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = generator(1)
    return (
        torch.randn(num_tokens, HIDDEN, generator=g).to(dtype),
        torch.randn(num_tokens, EXPERTS, generator=g).to(dtype),
    )


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (silu(gate) * up)


def by_token(hidden: Tensor, logits: Tensor, weights: MoeWeights) -> Tensor:
    """Go through tokens and their experts one by one, in float64."""
    rows = []
    for x, row in zip(hidden.double(), logits.double(), strict=True):
        scores = row.softmax(0) if weights.scoring is Scoring.SOFTMAX else row.sigmoid()
        chosen = sorted(range(EXPERTS), key=lambda e: -scores[e].item())[: weights.top_k]
        total = sum(scores[e] for e in chosen) if weights.renormalize else 1
        rows.append(
            sum(scores[e] / total * mlp(x, weights.gate_up[e].double(), weights.down[e].double()) for e in chosen)
        )
    return torch.stack(rows)


@pytest.mark.parametrize("num_tokens", [1, 2, 17])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scoring", Scoring)
def test_equals_the_loop_over_tokens(num_tokens: int, top_k: int, renormalize: bool, scoring: Scoring) -> None:
    weights = make_weights(top_k=top_k, renormalize=renormalize, scoring=scoring)
    hidden, logits = make_inputs(num_tokens)
    with ForwardContext({LAYER: weights}).running(), check_ops():
        out = moe_forward(hidden, logits, LAYER)
    torch.testing.assert_close(out.double(), by_token(hidden, logits, weights), atol=1e-4, rtol=1e-5)


def test_bfloat16_is_as_close_as_its_rounding() -> None:
    weights = make_weights(dtype=torch.bfloat16)
    hidden, logits = make_inputs(9, dtype=torch.bfloat16)
    with ForwardContext({LAYER: weights}).running(), check_ops():
        out = moe_forward(hidden, logits, LAYER)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), by_token(hidden, logits, weights), atol=0.2, rtol=3e-2)


def test_no_tokens() -> None:
    hidden, logits = make_inputs(0)
    with ForwardContext({LAYER: make_weights()}).running(), check_ops():
        assert moe_forward(hidden, logits, LAYER).shape == (0, HIDDEN)


def test_all_tokens_to_one_expert() -> None:
    weights = make_weights(top_k=1)
    hidden, _ = make_inputs(5)
    logits = torch.zeros(5, EXPERTS)
    logits[:, 3] = 9.0
    with ForwardContext({LAYER: weights}).running():
        out = moe_forward(hidden, logits, LAYER)
    expected = torch.stack([mlp(x, weights.gate_up[3], weights.down[3]) for x in hidden])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_sigmoids_that_are_all_zero_give_zero() -> None:
    hidden, _ = make_inputs(2)
    with ForwardContext({LAYER: make_weights(scoring=Scoring.SIGMOID)}).running():
        out = moe_forward(hidden, torch.full((2, EXPERTS), -1e4), LAYER)
    assert torch.equal(out, torch.zeros(2, HIDDEN))


@pytest.mark.parametrize("gated", [True, False])
def test_shared_experts_come_apart(gated: bool) -> None:
    g = generator(2)
    shared = SharedMoeWeights(
        routed=make_weights(),
        gate_up=torch.randn(10, HIDDEN, generator=g),
        down=torch.randn(HIDDEN, 5, generator=g),
        gate=torch.randn(1, HIDDEN, generator=g) if gated else None,
    )
    hidden, logits = make_inputs(7)
    with ForwardContext({LAYER: shared, "routed": shared.routed}).running(), check_ops():
        out, routed = moe_forward_shared(hidden, logits, LAYER)
        assert torch.equal(routed, moe_forward(hidden, logits, LayerName("routed")))
        with pytest.raises(OpError, match="a SharedMoeWeights under that name"):
            moe_forward(hidden, logits, LAYER)
    expected = torch.stack([mlp(x, shared.gate_up, shared.down) for x in hidden])
    if gated:
        expected = expected * torch.sigmoid(hidden @ shared.gate.t())
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_two_engines_give_their_own_results_for_one_name() -> None:
    hidden, logits = make_inputs(4)
    engines = [make_weights(seed=s) for s in (0, 1)]
    outs = []
    for weights in engines:
        with ForwardContext({LAYER: weights}).running():
            outs.append(moe_forward(hidden, logits, LAYER))
    assert not torch.equal(*outs)
    for out, weights in zip(outs, engines, strict=True):
        torch.testing.assert_close(out.double(), by_token(hidden, logits, weights), atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_compiled() -> None:
    torch._dynamo.reset()
    hidden, logits = make_inputs(4)

    def forward(hidden: Tensor, logits: Tensor) -> Tensor:
        shared, routed = moe_forward_shared(hidden * 1, logits, LAYER)
        return shared + routed

    weights = SharedMoeWeights(make_weights(), torch.randn(10, HIDDEN), torch.randn(HIDDEN, 5))
    with ForwardContext({LAYER: weights}).running():
        assert torch.equal(
            torch.compile(forward, backend="aot_eager", fullgraph=True)(hidden, logits), forward(hidden, logits)
        )


# --- transformers ---------------------------------------------------------------------------------------------------


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    g = generator(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return module.eval()


@pytest.fixture(params=["qwen3_moe", "qwen3_moe, weights as they are", "mixtral", "qwen2_moe"])
def block(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, MoeWeights | SharedMoeWeights]:
    """One of transformers' blocks, and its weights as ours."""
    sizes = {"hidden_size": HIDDEN, "num_experts_per_tok": 2}
    experts = {"num_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE}
    renormalize = request.param != "qwen3_moe, weights as they are"
    if request.param.startswith("qwen3_moe"):
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

        module = randomized(Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**sizes, **experts, norm_topk_prob=renormalize)))
    elif request.param == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

        config = MixtralConfig(**sizes, num_local_experts=EXPERTS, intermediate_size=INTERMEDIATE)
        module = randomized(MixtralSparseMoeBlock(config))
    else:
        from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeSparseMoeBlock

        config = Qwen2MoeConfig(**sizes, **experts, shared_expert_intermediate_size=5, norm_topk_prob=True)
        module = randomized(Qwen2MoeSparseMoeBlock(config))
    routed = MoeWeights(module.experts.gate_up_proj, module.experts.down_proj, top_k=2, renormalize=renormalize)
    if request.param != "qwen2_moe":
        return module, routed
    shared = module.shared_expert
    gate_up = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
    return module, SharedMoeWeights(routed, gate_up, shared.down_proj.weight, module.shared_expert_gate.weight)


@torch.no_grad()
def test_equals_transformers_blocks(block) -> None:
    module, weights = block
    hidden, _ = make_inputs(11)
    expected = module(hidden.unsqueeze(0)).squeeze(0)
    logits = hidden @ module.gate.weight.t()
    with ForwardContext({LAYER: weights}).running():
        if isinstance(weights, MoeWeights):
            out = moe_forward(hidden, logits, LAYER)
        else:
            out = sum(moe_forward_shared(hidden, logits, LAYER))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
