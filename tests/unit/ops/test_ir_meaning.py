"""What the native functions compute, against other definitions of the same: torch's, transformers', plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as apply_to_pairs
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from piecework.models.routed_experts import Router
from piecework.ops.activations import gelu_mul, silu_mul
from piecework.ops.moe.route import moe_route
from piecework.ops.norms import add_rms_norm, layer_norm, rms_norm
from piecework.ops.quantize import FP8, quantize_dynamic_per_token, quantize_group_fp8, quantize_static_fp8
from piecework.ops.rotary import rotary
from piecework.spec.latent_config import ExpertRouting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_llamas_and_gemmas_to_the_bit(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 24).to(dtype), torch.randn(24).to(dtype)
    llama, gemma = LlamaRMSNorm(24, eps=1e-5), GemmaRMSNorm(24, eps=1e-6)
    llama.weight, gemma.weight = nn.Parameter(weight), nn.Parameter(weight)
    assert torch.equal(rms_norm(x, weight, 1e-5), llama(x))
    assert torch.equal(rms_norm(x, weight, 1e-6, offset=1.0, round_first=False), gemma(x))
    normed, total = add_rms_norm(x, x, weight, 1e-5)
    assert torch.equal(total, x + x)
    assert torch.equal(normed, llama(x + x))


def test_layer_norm_is_torchs() -> None:
    x, weight, bias = torch.randn(5, 24) * 3 + 7, torch.randn(24), torch.randn(24)
    expected = torch.nn.functional.layer_norm(x, (24,), weight, bias)
    torch.testing.assert_close(layer_norm(x, weight, bias), expected, atol=1e-5, rtol=1e-5)


def test_gated_activations() -> None:
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    assert torch.equal(silu_mul(gate, up), silu(gate) * up)
    for approximate in ("none", "tanh"):
        assert torch.equal(gelu_mul(gate, up, approximate), gelu(gate, approximate=approximate) * up)


_ROPE: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [1.5 + i for i in range(8)],
        "factor": 2.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("rope_type", ["default", *sorted(ROPE_INIT_FUNCTIONS)])
def test_rotary_is_transformers_for_every_rope_type(rope_type: str) -> None:
    parameters = {"rope_type": rope_type, "rope_theta": 1e4, **_ROPE.get(rope_type, {})}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=64, rope_parameters=parameters
    )
    x = torch.zeros(1, 40, 64)
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(40).unsqueeze(0))
    q, k = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    for a, b in zip(rotary(q, k, cos.unsqueeze(1), sin.unsqueeze(1)), expected, strict=True):
        assert torch.equal(a, b)


def test_rotary_of_pairs_and_of_a_part_of_a_head() -> None:
    q, k, angles = torch.randn(1, 4, 5, 16), torch.randn(1, 1, 5, 16), torch.randn(1, 5, 4)
    halves = torch.cat([angles, angles], -1)  # glm gives the angles as halves, and repeats the first one
    expected = apply_to_pairs(q, k, halves.cos(), halves.sin())
    pairs = angles.repeat_interleave(2, -1).unsqueeze(1)
    for a, b in zip(rotary(q, k, pairs.cos(), pairs.sin(), interleaved=True), expected, strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, k if a.shape == k.shape else q)
    assert torch.equal(rotary(q, k, pairs.cos(), pairs.sin())[0][..., 8:], q[..., 8:])


def test_static_fp8_rounds_to_even_and_saturates() -> None:
    x = torch.tensor([[1.0625, 1.1875, 1e9, -1e9, 0.0]])
    found = quantize_static_fp8(x, torch.tensor([1.0])).float()
    assert found.tolist() == [[1.0, 1.25, 448.0, -448.0, 0.0]]


@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_each_row_has_the_scale_that_its_largest_value_needs(dtype: torch.dtype) -> None:
    x = torch.randn(4, 33) * torch.tensor([[1e-2], [1.0], [1e3], [0.0]])
    quantized, scale = quantize_dynamic_per_token(x, dtype)
    assert scale.shape == (4, 1)
    largest = quantized.float().abs().amax(-1)
    assert largest.tolist() == [448.0 if dtype == FP8 else 127.0] * 3 + [0.0]
    step = scale / 2 if dtype == torch.int8 else x.abs() / 16 + scale * 2**-10
    assert bool(((quantized.float() * scale - x).abs() <= step * 1.001).all())


def test_scales_have_a_least_value() -> None:
    x = torch.full((1, 128), 1e-12)
    assert quantize_dynamic_per_token(x)[1].item() == pytest.approx(1 / (448 * 512))
    assert quantize_dynamic_per_token(x, torch.int8)[1].item() == pytest.approx(1e-12)
    assert quantize_group_fp8(x)[1].item() == pytest.approx(1e-10 / 448)


def test_groups_are_rows_of_their_own() -> None:
    x = torch.randn(3, 256)
    quantized, scale = quantize_group_fp8(x, 64)
    rows, scales = quantize_dynamic_per_token(x.view(3, 4, 64))
    assert torch.equal(quantized.view(3, 4, 64).float(), rows.float())
    assert torch.equal(scale, scales.squeeze(-1))
    with pytest.raises(RuntimeError):
        quantize_group_fp8(x, 100)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_routing_is_that_of_the_routers_module(scoring: str, biased: bool, groups: tuple[int, int]) -> None:
    routing = ExpertRouting(
        num_experts=16,
        top_k=3,
        intermediate=8,
        scoring=scoring,
        num_groups=groups[0],
        top_groups=groups[1],
        normalized=True,
        scale=2.5,
        biased=biased,
        shared=0,
        first_layer=0,
    )
    router = Router(routing, hidden_size=8)
    nn.init.normal_(router.weight)
    if router.e_score_correction_bias is not None:
        nn.init.normal_(router.e_score_correction_bias)
    hidden = torch.randn(7, 8)
    experts, weights = router(hidden)
    logits = hidden @ router.weight.T
    bias = router.e_score_correction_bias
    found, chosen = moe_route(logits, 3, scoring, renormalize=True, bias=bias, num_groups=groups[0],
                              top_groups=groups[1], scale=2.5)  # fmt: skip
    by_expert = [torch.zeros(7, 16).scatter(1, e, w) for e, w in ((experts, weights), (chosen, found))]
    # without a bias, the module's probabilities of other groups are 0 instead of impossible
    torch.testing.assert_close(*by_expert)


def test_native_functions_change_nothing_and_return_new_tensors() -> None:
    x: Tensor = torch.ones(2, 4)
    assert rms_norm(x).data_ptr() != x.data_ptr()
    assert torch.equal(x, torch.ones(2, 4))
