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

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from piecework.ops.sequences import Sequences


class Regime(StrEnum):
    """What kind of tokens a forward has."""

    DECODE = "decode"
    PREFILL = "prefill"
    MIXED = "mixed"


class Queries(NamedTuple):
    """Queries of new tokens, grouped by sequence, decode sequences first.

    Attributes:
        q_nope: [T, H, N], any strides.
        q_pe: [T, H, R], rotated, halves apart (see `mla_write`), unless `turned` says otherwise.
        turned: False where `q_pe` are pairs (2i, 2i + 1) yet to be rotated, by the angles of the new keys.
    """

    q_nope: Tensor
    q_pe: Tensor
    turned: bool = True


class Angles(NamedTuple):
    """Of each token's position, attention scaling included; None both where queries are rotated already.

    Attributes:
        cos: [T, R / 2], float32 or the dtype of what is rotated.
        sin: the same.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None


ROTATED: Final = Angles()
"""For queries that are rotated already."""


class NewLatents(NamedTuple):
    """What new tokens bring, and where it goes.

    Attributes:
        compressed: [T, L + R], float32 | bfloat16 | float16: latents before their norm, and keys before their
            rotation, which are pairs (2i, 2i + 1).
        norm_weight: [L], of the RMS norm, which is computed in float32, rounded, and then multiplied with this.
        eps: of the norm.
        cos: [T, R / 2], and `sin`: of each token's position, attention scaling included; float32 or the dtype of
            `compressed`.
        sin: [T, R / 2].
        latent_cache: [blocks, B, E], of the dtype of `compressed` or uint8, written in place.
        slot_mapping: [T] int64, block * B + offset of each new token.
    """

    compressed: Tensor
    norm_weight: Tensor
    eps: float
    cos: Tensor
    sin: Tensor
    latent_cache: Tensor
    slot_mapping: Tensor


class LatentWeights(NamedTuple):
    """What expands latents.

    Attributes:
        kv_b_weight: [H * (N + V), L], which expands latents to each head's key and value.
        w_uk: [H, N, L], the keys' part of it.
        w_uv: [H, L, V], the values' part of it. None where that is folded into what comes after; in the regime `decode`
            only.
    """

    kv_b_weight: Tensor
    w_uk: Tensor
    w_uv: Tensor | None


def by_head(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [D, H, K] with weight [H, K, W], head by head: [D, H, W], where each head's rows lie together."""
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)


@dataclass(frozen=True)
class LatentCores:
    """The functions that `latent_attention` is made of besides linear layers, called as the operators are.

    Attributes:
        write: `mla_write`.
        decode: `mla_decode`.
        write_decode: `mla_write_decode`.
        prefill: `mla_prefill`.
        rows: takes rows begin … begin + count - 1 of x: (x, begin, count).
        product: `head_matmul`.
    """

    write: Callable[..., Tensor]
    decode: Callable[..., Tensor]
    write_decode: Callable[..., Tensor]
    prefill: Callable[..., Tensor]
    rows: Callable[[Tensor, int, int], Tensor]
    product: Callable[[Tensor, Tensor], Tensor] = by_head


def latent_attention(
    regime: Regime | str,
    cores: LatentCores,
    *,
    queries: Queries,
    new: NewLatents,
    sequences: Sequences,
    num_prefill_tokens: int,
    scale: float,
    weights: LatentWeights,
) -> Tensor:
    """Store the new tokens' latents, then attend causally, each sequence over its own cached tokens.

    Args:
        regime: `decode` where all tokens are decode tokens, `prefill` where none is; `mixed` is right for any batch.
        cores: what does the steps.
        queries: of the new tokens.
        new: their latents and keys, and the cache.
        sequences: whose they are.
        num_prefill_tokens: P = T - D.
        scale: factor of the scores before the softmax.
        weights: what expands latents.

    Returns:
        [T, H * V], or without `w_uv` [T, H * L], contiguous, dtype of the queries.
    """
    q_nope, q_pe, turned = queries
    kv_b_weight, w_uk, w_uv = weights
    block_tables, seq_lens, _, num_decode_tokens = sequences
    if regime == Regime.DECODE:
        q_latent = cores.product(q_nope, w_uk)
        latents = cores.write_decode(q_latent, q_pe, turned, *new, block_tables, seq_lens, scale)
        return (latents if w_uv is None else cores.product(latents, w_uv)).flatten(1)
    assert w_uv is not None
    rank, cache = w_uk.shape[2], new.latent_cache
    angles = ROTATED if turned else Angles(new.cos, new.sin)
    entry = cores.write(*new)
    if regime == Regime.PREFILL:
        kv = linear(entry[:, :rank], kv_b_weight)
        prompts = sequences[:3]
        return cores.prefill(q_nope, q_pe, kv, entry, kv_b_weight, cache, *prompts, 0, scale, None, *angles)
    q_latent = cores.product(cores.rows(q_nope, 0, num_decode_tokens), w_uk)
    latents = cores.decode(q_latent, q_pe, entry, cache, block_tables, seq_lens, scale, *angles)
    fresh = cores.rows(entry, num_decode_tokens, num_prefill_tokens)
    kv = linear(fresh[:, :rank], kv_b_weight)
    values = cores.product(latents, w_uv).flatten(1)
    return cores.prefill(q_nope, q_pe, kv, entry, kv_b_weight, cache, *sequences, scale, values, *angles)
