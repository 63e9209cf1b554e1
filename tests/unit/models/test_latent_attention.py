"""`MultiHeadLatentAttention` by itself: any engine's layer, with its own cache and weights by transformers' names."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from piecework import MultiHeadLatentAttention
from piecework.bundle.plan import Recipe
from piecework.bundle.run.constants import as_source, make_constants
from piecework.models import latent_attention
from piecework.models.batch import ForwardBatch
from piecework.models.latent_attention import LatentNorm, LatentOptions, LatentRotary, latent_sources, paired, rotated
from piecework.ops.mla.core import Regime
from piecework.spec.latent_config import MLA_MODES, LatentSizes

HIDDEN, HEADS = 24, 3
SIZES = LatentSizes(kv_rank=20, rope_dim=6, nope_dim=10, value_dim=7, query_rank=9)
SCALE = 16**-0.5


def make_layer(*, sizes: LatentSizes = SIZES, **options: Any) -> MultiHeadLatentAttention:
    torch.manual_seed(0)
    layer = MultiHeadLatentAttention(HIDDEN, HEADS, sizes=sizes, options=LatentOptions(scale=SCALE, **options))
    return layer.requires_grad_(False)


def batch_of(num_cached: int, num_new: int, *, regime: Regime = Regime.MIXED, decode: bool = False) -> ForwardBatch:
    """One sequence in blocks 2, 1, 3."""
    positions = torch.arange(num_cached, num_cached + num_new)
    blocks = torch.tensor([2, 1, 3])
    return ForwardBatch(
        slot_mapping=blocks[positions // 16] * 16 + positions % 16,
        block_tables=blocks.unsqueeze(0),
        seq_lens=torch.tensor([num_cached + num_new]),
        query_start=torch.tensor([0, num_new]),
        num_decode_tokens=num_new if decode else 0,
        num_prefill_tokens=0 if decode else num_new,
        regime=regime,
    )


def reference(layer: MultiHeadLatentAttention, hidden: Tensor) -> Tensor:
    """Run transformers' attention, which expands all keys and values, on a whole sequence."""
    sizes = layer.sizes
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        kv_lora_rank=sizes.kv_rank,
        q_lora_rank=sizes.query_rank,
        qk_rope_head_dim=sizes.rope_dim,
        qk_nope_head_dim=sizes.nope_dim,
        v_head_dim=sizes.value_dim,
        attention_bias=layer.options.bias,
        rope_interleave=layer.options.interleaved,
    )
    config._attn_implementation = "eager"
    attention = DeepseekV3Attention(config, 0).eval()
    attention.load_state_dict(layer.state_dict(), strict=True)
    length = hidden.shape[0]
    angles = DeepseekV3RotaryEmbedding(config)(hidden, torch.arange(length).unsqueeze(0))
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        out: Tensor = attention(hidden.unsqueeze(0), position_embeddings=angles, attention_mask=mask)[0]
    return out.squeeze(0)


def angles(num_cached: int, num_new: int) -> tuple[Tensor, Tensor]:
    frequencies = 1 / 10000 ** (torch.arange(0, SIZES.rope_dim, 2) / SIZES.rope_dim)
    cos, sin = LatentRotary(frequencies, scaling=1.0)(torch.arange(num_cached, num_cached + num_new))
    return cos, sin


@pytest.mark.parametrize("mla", MLA_MODES)
@pytest.mark.parametrize("query_rank", [9, None])
@pytest.mark.parametrize(("bias", "interleaved"), [(False, True), (True, False)])
def test_equals_transformers_layer(mla: str, query_rank: int | None, bias: bool, interleaved: bool) -> None:
    sizes = LatentSizes(**{**vars(SIZES), "query_rank": query_rank})
    layer = make_layer(sizes=sizes, mla=mla, bias=bias, interleaved=interleaved)
    layer.allocate_cache(4)
    hidden = torch.randn(40, HIDDEN)
    wanted = reference(layer, hidden)
    first = layer(hidden[:21], *angles(0, 21), batch_of(0, 21, regime=Regime.PREFILL))
    second = layer(hidden[21:39], *angles(21, 18), batch_of(21, 18))
    third = layer(hidden[39:], *angles(39, 1), batch_of(39, 1, regime=Regime.DECODE, decode=True))
    torch.testing.assert_close(torch.cat([first, second, third]), wanted, atol=2e-6, rtol=1e-5)


def test_a_cache_takes_its_blocks_and_no_more() -> None:
    layer = make_layer().to(torch.bfloat16)
    layer.allocate_cache(5, block_size=8)
    assert layer.latent_cache.shape == (5, 8, 20 + 6)
    assert layer.latent_cache.dtype == torch.bfloat16
    assert not layer.latent_cache.any()


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 20 + 4 + 6 * 4), (torch.bfloat16, 20 + 4 + 6 * 2)])
def test_a_cache_in_fp8_follows_the_type_of_the_weights(dtype: torch.dtype, width: int) -> None:
    exact, layer = make_layer().to(dtype), make_layer(kv_cache_dtype="fp8").to(dtype)
    for each in (exact, layer):
        each.absorb()
        each.allocate_cache(4)
    assert (layer.latent_cache.dtype, layer.latent_cache.shape) == (torch.uint8, (4, 16, width))
    hidden, (cos, sin) = torch.randn(40, HIDDEN, dtype=dtype), angles(0, 40)
    wanted, found = (each(hidden, cos, sin, batch_of(0, 40)) for each in (exact, layer))
    assert 1e-4 < ((found - wanted).abs().max() / wanted.abs().max()).item() < 0.1


def test_absorbed_weights_follow_what_is_loaded() -> None:
    layer, other = make_layer(), make_layer()
    other.kv_b_proj.weight.mul_(2)
    before = layer.w_uk.clone()
    layer.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(layer.w_uk, 2 * before)
    weight = layer.kv_b_proj.weight.view(HEADS, 17, 20)
    assert torch.equal(layer.w_uk, weight[:, :10])
    assert torch.equal(layer.w_uv, weight[:, 10:].transpose(1, 2))
    assert not {"w_uk", "w_uv", "latent_cache"} & layer.state_dict().keys()


def test_its_sources_make_what_absorb_does() -> None:
    layer = make_layer()
    sources = latent_sources(layer, name="layers.3.attention")
    checkpoint = {"layers.3.attention.kv_b_proj.weight": layer.kv_b_proj.weight}
    recipes = [Recipe(n, source.shape, "float32", source=source) for n, source in sources.items()]

    class Tensors:
        def names(self) -> list[str]:
            return list(checkpoint)

        def get(self, name: str) -> Tensor:
            return checkpoint[name]

    made = make_constants(recipes, source=Tensors(), literals={}, device="cpu")
    assert list(sources) == ["layers.3.attention.w_uk", "layers.3.attention.w_uv"]
    assert torch.equal(made[0], layer.w_uk)
    assert torch.equal(made[1], layer.w_uv)


WIDE_VALUES = LatentSizes(kv_rank=20, rope_dim=6, nope_dim=10, value_dim=13, query_rank=9)  # of 24 by 20 only 11


def test_up_projection_and_output_are_one_weight_where_that_is_less_work() -> None:
    layer = make_layer(sizes=WIDE_VALUES, bias=True)
    assert (layer.output.apart, layer.output.folded) == (2 * 3 * 13 * (20 + 24), 2 * 3 * 20 * 24)
    assert layer.folds
    (note,) = layer.decisions()
    assert "are one weight: 0.00288 MFLOP" in note
    assert "apart it were 0.00343 MFLOP" in note
    hidden, rotary = torch.randn(40, HIDDEN), LatentRotary(0.1 ** torch.arange(3.0), scaling=1.0)
    layer.allocate_cache(4)
    layer(hidden[:39], *rotary(torch.arange(39)), batch_of(0, 39))
    angles = rotary(torch.tensor([39]))
    found = layer(hidden[39:], *angles, batch_of(39, 1, regime=Regime.DECODE, decode=True))
    apart = layer(hidden[39:], *angles, batch_of(39, 1, regime=Regime.MIXED, decode=True))
    torch.testing.assert_close(found, apart, rtol=1e-5, atol=1e-5)
    layer.w_vo.zero_()  # it is used, and the bias is still added
    found = layer(hidden[39:], *angles, batch_of(39, 1, regime=Regime.DECODE, decode=True))
    assert torch.equal(found, layer.o_proj.bias.unsqueeze(0))


def test_they_stay_apart_elsewhere() -> None:
    layer = make_layer()
    assert layer.output.apart < layer.output.folded
    assert layer.w_vo is None
    (note,) = layer.decisions()
    assert "stay apart: 0.00185 MFLOP per token and layer; as one weight it were 0.00288 MFLOP" in note
    assert list(latent_sources(layer, name="a")) == ["a.w_uk", "a.w_uv"]
    opaque = make_layer(sizes=WIDE_VALUES, mla="opaque")
    assert opaque.w_vo is None
    assert opaque.decisions() == ()


def test_the_folded_weight_is_computed_in_float32() -> None:
    layer = make_layer(sizes=WIDE_VALUES).to(torch.bfloat16)
    layer.absorb()
    checkpoint = {f"a.{name}": value for name, value in layer.state_dict().items()}
    source = latent_sources(layer, name="a")["a.w_vo"]
    recipe = Recipe("a.w_vo", source.shape, "bfloat16", source=source)
    (made,) = make_constants([recipe], source=as_source(checkpoint), literals={}, device="cpu")
    out = layer.o_proj.weight.double().unflatten(1, (HEADS, -1))
    exact = torch.einsum("xhv,hlv->xhl", out, layer.w_uv.double()).flatten(1)
    for weight in (made, layer.w_vo):
        assert weight.dtype is torch.bfloat16
        torch.testing.assert_close(weight.double(), exact, rtol=2**-8, atol=1e-6)


def test_the_example_runs() -> None:
    found = doctest.DocTestFinder().find(MultiHeadLatentAttention, globs=vars(latent_attention).copy())
    runner = doctest.DocTestRunner()
    assert sum(runner.run(example).attempted for example in found) == 6
    assert runner.summarize(verbose=False).failed == 0


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="exposed, opaque"):
        make_layer(mla="hidden")
    with pytest.raises(ValueError, match="auto, fp8"):
        make_layer(kv_cache_dtype="int4")


def test_rotation_keeps_products_whatever_the_layout() -> None:
    x, y = torch.randn(2, 5, 1, 6)
    cos, sin = angles(3, 5)
    in_pairs = paired(x.squeeze(1)).unsqueeze(1), paired(y.squeeze(1)).unsqueeze(1)
    halves = [rotated(t, cos, sin, interleaved=False) for t in (x, y)]
    pairs = [rotated(t, cos, sin, interleaved=True) for t in in_pairs]
    for one, other in zip(halves, pairs, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close((halves[0] * halves[1]).sum(-1), (x * y).sum(-1))


def test_a_norm_rounds_before_its_weight() -> None:
    norm = LatentNorm(8, eps=1e-6).to(torch.bfloat16).requires_grad_(False)
    norm.weight.copy_(torch.linspace(0.5, 2, 8))
    x = torch.randn(3, 8).to(torch.bfloat16)
    wide = x.float()
    normed = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).to(torch.bfloat16)
    torch.testing.assert_close(norm(x), norm.weight * normed)
