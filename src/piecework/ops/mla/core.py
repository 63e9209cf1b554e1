"""The one description of multi-head latent attention between its projections (DeepSeek-V2, arXiv:2405.04434).

The cache holds one normed latent and one rotated key per token. New tokens of prompts are attended over keys and values
expanded from latents. Decode tokens are attended over the latents themselves: the key projection is absorbed into the
query, and the value projection comes after. What the steps are is written here and nowhere else; with which functions
they are done is the caller's: operators that a trace keeps apart, or plain and native functions within one operator.

Shape suffixes: T new tokens, D of them decode and first, P prefill; S sequences, H heads, N dimensions of a head
without rotation, R with, V of a value, L of a latent; B block size, W blocks per row of the block table, E
the length of an entry in the cache (ops/mla/cache.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear


class Regime(StrEnum):
    """What kind of tokens a forward has."""

    DECODE = "decode"
    PREFILL = "prefill"
    MIXED = "mixed"


class Write(Protocol):
    """Norm, rotate and store the new tokens' latents; see `mla_write`."""

    def __call__(
        self,
        compressed: Tensor,
        norm_weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        latent_cache: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """Return what the cache then holds, [T, L + R]."""


class Decode(Protocol):
    """Attend one token per sequence over latents; see `mla_decode`."""

    def __call__(
        self,
        q_latent: Tensor,
        q_pe: Tensor,
        entry: Tensor | None,
        latent_cache: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        scale: float,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        """Return [D, H, L]."""


class WriteDecode(Protocol):
    """Do what `Write` and then `Decode` do, where all tokens are decode tokens; see `mla_write_decode`."""

    def __call__(
        self,
        q_latent: Tensor,
        q_pe: Tensor,
        turned: bool,  # noqa: FBT001  an operator's arguments come in order
        compressed: Tensor,
        norm_weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        latent_cache: Tensor,
        slot_mapping: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        scale: float,
    ) -> Tensor:
        """Return [D, H, L]."""


class Prefill(Protocol):
    """Attend prompts' new tokens over expanded keys and values; see `mla_prefill`."""

    def __call__(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        kv: Tensor,
        entry: Tensor,
        kv_b_weight: Tensor,
        latent_cache: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        query_start: Tensor,
        num_decode_tokens: int,
        scale: float,
        decode_out: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        """Return [T, H * V]."""


class Rows(Protocol):
    """Take rows begin … begin + count - 1."""

    def __call__(self, x: Tensor, begin: int, count: int) -> Tensor:
        """Return [count, ...]."""


class Product(Protocol):
    """Multiply every head's tokens with the head's own matrix; see `head_matmul`."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x [D, H, K] times weight [H, K, W]: [D, H, W], any strides."""


def by_head(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [D, H, K] with weight [H, K, W], head by head: [D, H, W], where each head's rows lie together."""
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)


@dataclass(frozen=True)
class LatentCores:
    """The functions that `latent_attention` is made of besides linear layers."""

    write: Write
    decode: Decode
    write_decode: WriteDecode
    prefill: Prefill
    rows: Rows
    product: Product = by_head


def latent_attention(
    regime: Regime | str,
    cores: LatentCores,
    *,
    q_nope: Tensor,
    q_pe: Tensor,
    compressed: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    num_decode_tokens: int,
    num_prefill_tokens: int,
    scale: float,
    kv_b_weight: Tensor,
    w_uk: Tensor,
    w_uv: Tensor | None,
    turned: bool = True,
) -> Tensor:
    """Store the new tokens' latents, then attend causally, each sequence over its own cached tokens.

    Args:
        regime: `decode` where all tokens are decode tokens, `prefill` where none is; `mixed` is right for any batch.
        cores: see there.
        q_nope: [T, H, N], any strides; tokens grouped by sequence, decode sequences first.
        q_pe: [T, H, R], rotated, halves apart (see `mla_write`), unless it says otherwise in `turned`.
        compressed: [T, L + R], latents before their norm and keys before their rotation.
        norm_weight: [L].
        eps: of the norm.
        cos: [T, R / 2], and `sin`: of each token's position, attention scaling included.
        sin: see `cos`.
        latent_cache: [blocks, B, E], written in place.
        slot_mapping: [T] int64, block * B + offset of each new token.
        block_tables: [S, W] int64; row s lists the blocks of sequence s, padded with any valid block.
        seq_lens: [S] int64, tokens in the cache after this step, at least 1.
        query_start: [S + 1] int64, prefix sums of the new tokens per sequence.
        num_decode_tokens: D, which is also the number of leading sequences with one new token each.
        num_prefill_tokens: P = T - D.
        scale: factor of the scores before the softmax.
        kv_b_weight: [H * (N + V), L], which expands latents to each head's key and value.
        w_uk: [H, N, L], the keys' part of it.
        w_uv: [H, L, V], the values' part of it. None where that is folded into what comes after; in the regime `decode`
            only.
        turned: False where `q_pe` are pairs (2i, 2i + 1) yet to be rotated, by the angles of the new keys.

    Returns:
        [T, H * V], or without `w_uv` [T, H * L], contiguous, dtype of the queries.
    """
    rank = w_uk.shape[2]
    written = (compressed, norm_weight, eps, cos, sin, latent_cache, slot_mapping)
    if regime == Regime.DECODE:
        q_latent = cores.product(q_nope, w_uk)
        latents = cores.write_decode(q_latent, q_pe, turned, *written, block_tables, seq_lens, scale)
        return (latents if w_uv is None else cores.product(latents, w_uv)).flatten(1)
    assert w_uv is not None
    angles = (None, None) if turned else (cos, sin)
    entry = cores.write(*written)
    prompts = (kv_b_weight, latent_cache, block_tables, seq_lens, query_start)
    if regime == Regime.PREFILL:
        kv = linear(entry[:, :rank], kv_b_weight)
        return cores.prefill(q_nope, q_pe, kv, entry, *prompts, 0, scale, None, *angles)
    q_latent = cores.product(cores.rows(q_nope, 0, num_decode_tokens), w_uk)
    latents = cores.decode(q_latent, q_pe, entry, latent_cache, block_tables, seq_lens, scale, *angles)
    new = cores.rows(entry, num_decode_tokens, num_prefill_tokens)
    kv = linear(new[:, :rank], kv_b_weight)
    values = cores.product(latents, w_uv).flatten(1)
    return cores.prefill(q_nope, q_pe, kv, entry, *prompts, num_decode_tokens, scale, values, *angles)
