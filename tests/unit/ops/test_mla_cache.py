"""Entries of latents in fp8: what they hold, where it lies, and that attention is over what they hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from piecework import OpError
from piecework.ops.mla import plain as mla_plain
from piecework.ops.mla.cache import Fp8Entry, decode, encode, entry_width, put, take
from piecework.ops.mla.core import LatentCores, latent_attention
from piecework.ops.mla.operators import PLAIN, TRACED, mla_write
from piecework.ops.quantize import FP8
from tests.unit.ops.mla_cases import BATCHES, MlaCase, Sizes, in_fp8, make_mla_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT = (torch.float32, torch.bfloat16)


def test_the_layout_is_that_of_fp8_ds_mla() -> None:
    entry = Fp8Entry(512, 64, 2)
    assert (entry.scales, entry.key, entry.size) == (512, 528, 656)
    assert entry_width(torch.uint8, torch.bfloat16, rank=512, rope=64) == 656
    assert entry_width(torch.bfloat16, torch.bfloat16, rank=512, rope=64) == 576


@pytest.mark.parametrize("rank", [1, 10, 127, 128, 129, 300])
@pytest.mark.parametrize("rope", [2, 6, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_parts_are_aligned_and_do_not_overlap(rank: int, rope: int, itemsize: int) -> None:
    entry = Fp8Entry(rank, rope, itemsize)
    assert all(at % 4 == 0 for at in (entry.scales, entry.key, entry.size))
    assert rank <= entry.scales < rank + 4
    assert entry.key == entry.scales + 4 * entry.num_scales
    assert 0 <= entry.size - entry.key - rope * itemsize < 4


@given(
    rank=st.sampled_from([1, 7, 128, 130, 512]),
    rope=st.sampled_from([2, 6, 64]),
    dtype=st.sampled_from(DTYPES),
    power=st.integers(-8, 12),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_what_is_read_is_the_nearest_of_fp8(rank: int, rope: int, dtype: torch.dtype, power: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(5, rank + rope, generator=generator) * 20 - 16  # magnitudes of zero, of subnormals, and larger
    entry = (torch.randn(5, rank + rope, generator=generator) * 2**spread * 2**power).clamp(-6e4, 6e4).to(dtype)
    encoded = encode(entry, rank)
    found = decode(encoded, rank=rank, rope=rope, dtype=dtype)
    assert torch.equal(found[:, rank:], entry[:, rank:])
    layout = Fp8Entry(rank, rope, dtype.itemsize)
    for first in range(0, rank, 128):
        tile = entry[:, first : min(first + 128, rank)].double()
        most = tile.abs().amax(-1, keepdim=True)
        scale = most.float().clamp_min(1e-10) / 448
        at = layout.scales + first // 128 * 4
        assert torch.equal(encoded[:, at : at + 4].clone().view(torch.float32), scale)
        step = 2 ** (tile / scale).abs().clamp_min(2**-6).log2().floor() / 8 * scale
        error = (found[:, first : first + tile.shape[1]].double() - tile).abs()
        rounded = 0 if dtype is torch.float32 else tile.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
        assert (error <= step / 2 * (1 + 1e-5) + rounded).all()


@pytest.mark.parametrize("dtype", EXACT)
def test_every_code_is_read_right(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    layout = Fp8Entry(256, 2, dtype.itemsize)
    encoded = torch.zeros(1, layout.size, dtype=torch.uint8)
    encoded[0, :256] = codes
    encoded[0, layout.scales : layout.key] = torch.tensor([0.25, 2.0**40]).view(torch.uint8)
    found = decode(encoded, rank=256, rope=2, dtype=dtype)[0, :256]
    wanted = codes.view(FP8).double() * torch.tensor([0.25, 2.0**40]).repeat_interleave(128)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0, equal_nan=True)
    assert found.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]


def test_zeros_are_zeros_and_a_nan_takes_its_tile() -> None:
    entry = torch.ones(4, 300 + 2)
    entry[0, :300] = 0
    entry[1, 130] = float("nan")
    entry[2, 299] = float("inf")
    entry[3, :128] = 1e-30
    found = decode(encode(entry, 300), rank=300, rope=2, dtype=torch.float32)
    assert not found[0, :300].any()
    assert found[1].isnan().nonzero().flatten().tolist() == list(range(128, 256))
    assert found[2].isnan().nonzero().flatten().tolist() == list(range(256, 300))
    assert not found[3, :128].any()
    assert torch.equal(found[3, 128:], entry[3, 128:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_but_given_slots_is_written_and_what_is_stored_comes_back(dtype: torch.dtype) -> None:
    cache = torch.full((3, 4, Fp8Entry(130, 6, dtype.itemsize).size), 7, dtype=torch.uint8)
    entry, slots = torch.randn(3, 136).to(dtype), torch.tensor([9, 0, 6])
    stored = put(entry, 130, cache, slots)
    assert (stored != entry).any()
    assert torch.equal(take(cache, slots, rank=130, rope=6, dtype=dtype), stored)
    assert (cache != 7).any(-1).flatten().nonzero().flatten().tolist() == [0, 6, 9]


def over_decoded_entries(case: MlaCase, regime: str) -> Tensor:
    """Attend over a cache of the model's type, which holds what the one in fp8 does."""
    named = case.named
    sizes = {"rank": named["norm_weight"].shape[0], "rope": named["q_pe"].shape[2], "dtype": named["q_pe"].dtype}

    def write(*args: Tensor) -> Tensor:
        mla_plain.write(*args[:5], named["latent_cache"], args[6])
        args[5].copy_(decode(named["latent_cache"], **sizes))
        return take(args[5], args[6], **sizes)

    def write_decode(q_latent: Tensor, q_pe: Tensor, turned: bool, *args: Tensor) -> Tensor:
        assert turned
        return mla_plain.decode(q_latent, q_pe, write(*args[:7]), args[5], *args[7:])

    plain = decode(named["latent_cache"], **sizes)
    cores = LatentCores(write, PLAIN.decode, write_decode, PLAIN.prefill, PLAIN.rows)
    return latent_attention(regime, cores, **MlaCase({**named, "latent_cache": plain}, case.histories).values)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", EXACT)
def test_attention_is_over_what_the_cache_holds(batch: str, dtype: torch.dtype) -> None:
    case = in_fp8(make_mla_case(BATCHES[batch], sizes=Sizes(rank=130), dtype=dtype))
    twin = case.twin()
    out = latent_attention(case.regime, TRACED, **case.values)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype is torch.float32 else 1e-2}  # of products of other shapes
    torch.testing.assert_close(out, over_decoded_entries(twin, case.regime), **tolerance)
    assert torch.equal(case.named["latent_cache"], twin.named["latent_cache"])


def test_caches_that_do_not_fit_are_told_in_a_trace() -> None:
    case = make_mla_case(BATCHES["mixed"])
    names = ("compressed", "norm_weight", "eps", "cos", "sin", "latent_cache", "slot_mapping")
    with torch.device("meta"):
        tensors = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in case.named.items()}
        wrong = {"sizes 32 and 14": torch.empty(4, 4, 14, dtype=torch.uint8), "int8": torch.empty(4, 4, 14).char()}
        for found, cache in wrong.items():
            with pytest.raises(OpError, match=found):
                mla_write(*({**tensors, "latent_cache": cache}[n] for n in names))
