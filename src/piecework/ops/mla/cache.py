"""How a token's entry lies in the latent cache: its normed latent and its rotated key.

A cache of the model's type, [blocks, B, L + R], holds both as they are. A cache of uint8, [blocks, B, E], holds an
`Fp8Entry` per token: the latent as float8_e4m3fn with a scale for every 128 numbers, the key as it is. These are vLLM's
proportions of "fp8_ds_mla", after DeepSeek: with latents of 512 and keys of 64, in bfloat16, 656 bytes per token and
layer where the model's type takes 1152. The cache's dtype says which it is.

What is attended is what is stored: `put` returns entries as the cache then holds them, and new tokens are attended over
these. So results don't depend on which tokens came in one forward, or were found in the cache.

Shape suffixes as in `ops/mla/core.py`; E bytes of an entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from piecework.ops.quantize import FP8, LEAST_MAGNITUDE, most

TILE: Final = 128
"""Numbers of a latent that share a scale."""
_ALIGNED: Final = 4  # bytes: what scales and keys begin at a multiple of, and entries as well


@dataclass(frozen=True)
class Fp8Entry:
    """Where the parts of an entry in fp8 lie, in bytes, each at a multiple of 4; what lies between them is zero.

    The latent comes first, a byte for each number, then a float32 for each 128 of them (`num_scales`), then the key.

    Attributes:
        rank: L.
        rope: R.
        itemsize: bytes of a number of the key.
    """

    rank: int
    rope: int
    itemsize: int

    @property
    def num_scales(self) -> int:
        """Scales of a latent."""
        return -(-self.rank // TILE)

    @property
    def scales(self) -> int:
        """Where the scales begin."""
        return _aligned(self.rank)

    @property
    def key(self) -> int:
        """Where the key begins."""
        return self.scales + 4 * self.num_scales

    @property
    def size(self) -> int:
        """Bytes of an entry (E)."""
        return _aligned(self.key + self.rope * self.itemsize)


def entry_width(cache_dtype: torch.dtype, dtype: torch.dtype, *, rank: int, rope: int) -> int:
    """Return the last size of a latent cache of one dtype, for a model of another."""
    return Fp8Entry(rank, rope, dtype.itemsize).size if cache_dtype is torch.uint8 else rank + rope


def put(entry: Tensor, rank: int, latent_cache: Tensor, slot_mapping: Tensor) -> Tensor:
    """Store entries [T, L + R], each at its slot [T]; return them as the cache then holds them."""
    slots = latent_cache.flatten(0, 1)
    if latent_cache.dtype is not torch.uint8:
        slots.index_copy_(0, slot_mapping, entry)
        return entry
    encoded = encode(entry, rank)
    slots.index_copy_(0, slot_mapping, encoded)
    return decode(encoded, rank=rank, rope=entry.shape[1] - rank, dtype=entry.dtype)


def take(latent_cache: Tensor, slots: Tensor, *, rank: int, rope: int, dtype: torch.dtype) -> Tensor:
    """Copy the entries at `slots` [C] out of a cache: [C, L + R] of `dtype`."""
    found = latent_cache.flatten(0, 1).index_select(0, slots)
    return decode(found, rank=rank, rope=rope, dtype=dtype) if latent_cache.dtype is torch.uint8 else found


def encode(entry: Tensor, rank: int) -> Tensor:
    """Make entries in fp8, uint8 [T, E], of entries [T, L + R] in float32, bfloat16 or float16.

    A tile's scale is its largest magnitude, at least 1e-10, divided by 448, as in `quantize_group_fp8`. A tile with a
    NaN or an infinity is NaN throughout.
    """
    layout = Fp8Entry(rank, entry.shape[1] - rank, entry.element_size())
    whole = layout.num_scales * TILE
    tiles = pad(entry[:, :rank].float(), (0, whole - rank)).unflatten(1, (-1, TILE))
    scale = tiles.abs().amax(-1).clamp_min(LEAST_MAGNITUDE) / most(FP8)
    codes = (tiles / scale.unsqueeze(-1)).clamp(-most(FP8), most(FP8)).to(FP8)
    made = entry.new_zeros(entry.shape[0], layout.size, dtype=torch.uint8)
    made[:, :rank] = codes.flatten(1)[:, :rank].view(torch.uint8)
    made[:, layout.scales : layout.key] = scale.view(torch.uint8)
    keys = entry[:, rank:].contiguous().view(torch.uint8)
    made[:, layout.key : layout.key + keys.shape[1]] = keys
    return made


def decode(encoded: Tensor, *, rank: int, rope: int, dtype: torch.dtype) -> Tensor:
    """Make entries [..., L + R] of `dtype` of entries in fp8 [..., E]: products with scales are rounded once."""
    layout = Fp8Entry(rank, rope, dtype.itemsize)
    scale = encoded[..., layout.scales : layout.key].view(torch.float32).repeat_interleave(TILE, dim=-1)[..., :rank]
    made = encoded.new_empty((*encoded.shape[:-1], rank + rope), dtype=dtype)
    made[..., :rank] = encoded[..., :rank].view(FP8).float() * scale
    made[..., rank:] = encoded[..., layout.key : layout.key + rope * dtype.itemsize].view(dtype)
    return made


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
