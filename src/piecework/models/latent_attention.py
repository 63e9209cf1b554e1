"""`MultiHeadLatentAttention`: a layer whose cache holds one latent vector and one rotary key per token.

DeepSeek-V2 (arXiv:2405.04434), section 2.1. It is a module of its own, for any model and any engine that keeps a paged
cache: models/deepseek.py puts transformers' models on it. Parameters are named as transformers names them.

Shape suffixes: T new tokens, S sequences, X hidden size, H heads, N dimensions of a head without position, R rotary
ones, V of a value, L of a latent, B block size, E the length of an entry in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from piecework.bundle.recipes import HeadProduct, HeadRows, Source, Sources, Take
from piecework.models.batch import BLOCK_SIZE, ForwardBatch
from piecework.ops.mla.attention import mla_attention
from piecework.ops.mla.cache import entry_width
from piecework.ops.mla.core import LatentWeights, NewLatents, Queries, Regime, latent_attention
from piecework.ops.mla.operators import TRACED
from piecework.ops.sequences import Sequences
from piecework.spec.latent_config import (
    DEFAULT_KV_CACHE_DTYPE,
    DEFAULT_MLA,
    KV_CACHE_DTYPES,
    MLA_MODES,
    LatentSizes,
)

LATENT_CACHE: Final = "latent_cache"


@dataclass(frozen=True)
class LatentOptions:
    """What a layer is besides its sizes.

    Attributes:
        scale: factor of the scores before the softmax.
        eps: of the norms of compressed queries and of latents.
        bias: whether the projections from the hidden state, and to it, have a bias.
        interleaved: whether the rotary dimensions come as pairs (2i, 2i + 1), or as halves (i, i + R / 2).
        mla: "exposed" shows a compiler every step of the layer between its projections, "opaque" hides all of them in
            one operator. Both do the same steps.
        kv_cache_dtype: "auto" caches latents in the type of the weights, "fp8" as float8_e4m3fn with scales; new tokens
            attend each other's cached latents, not the exact ones. See `ops/mla/cache.py`.
    """

    scale: float
    eps: float = 1e-6
    bias: bool = False
    interleaved: bool = True
    mla: str = DEFAULT_MLA
    kv_cache_dtype: str = DEFAULT_KV_CACHE_DTYPE

    def __post_init__(self) -> None:
        if self.mla not in MLA_MODES:
            raise ValueError(f"mla={self.mla!r} is none of {', '.join(MLA_MODES)}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype={self.kv_cache_dtype!r} is none of {', '.join(KV_CACHE_DTYPES)}")


@final
class MultiHeadLatentAttention(nn.Module):
    """Multi-head latent attention over a paged cache.

    Prompts' new tokens are attended over keys and values expanded from latents. Decode tokens are attended over the
    latents themselves, by `w_uk` [H, N, L] and `w_uv` [H, L, V]: parts of `kv_b_proj`, laid out for that. They are
    filled from it whenever a state dict is loaded, and by `absorb`. Where it takes fewer operations, decode tokens go
    from latents to the hidden state by one weight, `w_vo` [X, H * L], which is the product of `o_proj` and `w_uv`.

    Args:
        hidden_size: X.
        num_heads: H.
        sizes: of latents, keys, values and compressed queries.
        options: the rest.

    Attributes:
        latent_cache: [blocks, B, E] (see `cache_entry`), written in place; on the meta device until `allocate_cache`,
            or until whoever keeps caches puts one there.

    Example:
        >>> sizes = LatentSizes(kv_rank=512, rope_dim=64, nope_dim=128, value_dim=128, query_rank=None)
        >>> layer = MultiHeadLatentAttention(2048, 16, sizes=sizes, options=LatentOptions(scale=192**-0.5))
        >>> layer.allocate_cache(num_blocks=64)
        >>> rotary = LatentRotary(10000.0 ** -(torch.arange(0, 64, 2) / 64), scaling=1.0)
        >>> batch = ForwardBatch(  # one prompt of 20 tokens, in blocks 3 and 5
        ...     slot_mapping=torch.tensor([*range(48, 64), *range(80, 84)]),
        ...     block_tables=torch.tensor([[3, 5]]),
        ...     seq_lens=torch.tensor([20]),
        ...     query_start=torch.tensor([0, 20]),
        ...     num_decode_tokens=0,
        ...     num_prefill_tokens=20,
        ... )
        >>> layer(torch.randn(20, 2048), *rotary(torch.arange(20)), batch).shape
        torch.Size([20, 2048])
    """

    w_uk: Tensor
    w_uv: Tensor
    w_vo: Tensor | None
    latent_cache: Tensor

    def __init__(self, hidden_size: int, num_heads: int, *, sizes: LatentSizes, options: LatentOptions) -> None:
        super().__init__()
        self.num_heads, self.sizes, self.options = num_heads, sizes, options
        query = num_heads * (sizes.nope_dim + sizes.rope_dim)
        if sizes.query_rank is None:
            self.q_proj = nn.Linear(hidden_size, query, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, sizes.query_rank, bias=options.bias)
            self.q_a_layernorm = LatentNorm(sizes.query_rank, eps=options.eps)
            self.q_b_proj = nn.Linear(sizes.query_rank, query, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, sizes.entry, bias=options.bias)
        self.kv_a_layernorm = LatentNorm(sizes.kv_rank, eps=options.eps)
        self.kv_b_proj = nn.Linear(sizes.kv_rank, num_heads * (sizes.nope_dim + sizes.value_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * sizes.value_dim, hidden_size, bias=options.bias)
        # made from kv_b_proj, so they are in no state dict
        self.register_buffer("w_uk", None, persistent=False)
        self.register_buffer("w_uv", None, persistent=False)
        self.register_buffer("w_vo", None, persistent=False)
        self.output = OutputOperations.of(hidden_size, num_heads, sizes)
        self.folds = options.mla == "exposed" and self.output.folded < self.output.apart
        self.absorb()
        self.register_load_state_dict_post_hook(_absorb)  # type: ignore[no-untyped-call]
        width, dtype = self.cache_entry(self.kv_b_proj.weight.dtype)
        cache = torch.empty(1, BLOCK_SIZE, width, dtype=dtype, device="meta")
        self.register_buffer(LATENT_CACHE, cache, persistent=False)

    def absorb(self) -> None:
        """Fill `w_uk`, `w_uv` and, where it is used, `w_vo`, after `kv_b_proj` or `o_proj` was changed.

        Values are moved; for `w_vo` they are multiplied in float32, and rounded once.
        """
        sizes = self.sizes
        weight = self.kv_b_proj.weight.detach().unflatten(0, (self.num_heads, sizes.nope_dim + sizes.value_dim))
        self.w_uk = weight[:, : sizes.nope_dim].contiguous()
        self.w_uv = weight[:, sizes.nope_dim :].transpose(1, 2).contiguous()
        if self.folds:
            out = self.o_proj.weight.detach().unflatten(1, (self.num_heads, sizes.value_dim))
            product = torch.einsum("xhv,hlv->xhl", out.float(), self.w_uv.float())
            self.w_vo = product.flatten(1).to(weight.dtype)

    def decisions(self) -> tuple[str, ...]:
        """Return what was decided for this layer by counting, for people."""
        if self.options.mla != "exposed":
            return ()
        apart, folded = (f"{count / 1e6:.3g} MFLOP" for count in (self.output.apart, self.output.folded))
        if self.folds:
            text = f"are one weight: {folded} per token and layer; apart it were {apart}"
        else:
            text = f"stay apart: {apart} per token and layer; as one weight it were {folded}"
        return (f"decode: the values' up-projection and the output projection {text}",)

    def cache_entry(self, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """Return the last size and the dtype of the cache of a layer whose weights are of `dtype`."""
        cached = torch.uint8 if self.options.kv_cache_dtype == "fp8" else dtype
        return entry_width(cached, dtype, rank=self.sizes.kv_rank, rope=self.sizes.rope_dim), cached

    def allocate_cache(self, num_blocks: int, *, block_size: int = BLOCK_SIZE) -> None:
        """Give the layer an empty cache [num_blocks, block_size, E], where its weights are."""
        weight = self.kv_b_proj.weight
        width, dtype = self.cache_entry(weight.dtype)
        self.latent_cache = torch.zeros(num_blocks, block_size, width, dtype=dtype, device=weight.device)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch) -> Tensor:
        """Store the new tokens' latents in the cache, and attend causally, each sequence over its own tokens.

        Args:
            hidden: [T, X].
            cos: [T, R / 2], of each token's angles, with the model's attention scaling; float32 or dtype of `hidden`.
            sin: [T, R / 2].
            batch: which tokens are whose, and where they go.

        Returns:
            [T, X].
        """
        sizes, options = self.sizes, self.options
        query = self._query(hidden).unflatten(-1, (self.num_heads, sizes.nope_dim + sizes.rope_dim))
        q_nope, q_pe = query.split([sizes.nope_dim, sizes.rope_dim], dim=-1)
        compressed = self.kv_a_proj_with_mqa(hidden)
        if not options.interleaved:
            compressed = torch.cat([compressed[:, : sizes.kv_rank], paired(compressed[:, sizes.kv_rank :])], dim=-1)
        turned = options.mla == "opaque"  # else attention takes queries in, and rotates them while it does
        if turned:
            q_pe = rotated(q_pe, cos, sin, interleaved=options.interleaved)
        elif not options.interleaved:
            q_pe = paired(q_pe)
        folded = self.w_vo if self.folds and batch.regime == Regime.DECODE else None
        norm = self.kv_a_layernorm
        new = NewLatents(compressed, norm.weight, norm.eps, cos, sin, self.latent_cache, batch.slot_mapping)
        sequences = Sequences(batch.block_tables, batch.seq_lens, batch.query_start, batch.num_decode_tokens)
        weights = LatentWeights(self.kv_b_proj.weight, self.w_uk, self.w_uv if folded is None else None)
        if options.mla == "opaque":
            attended = mla_attention(q_nope, q_pe, *new, *sequences, options.scale, *weights)
        else:
            attended = latent_attention(
                batch.regime,
                TRACED,
                queries=Queries(q_nope, q_pe, turned),
                new=new,
                sequences=sequences,
                num_prefill_tokens=batch.num_prefill_tokens,
                scale=options.scale,
                weights=weights,
            )
        out: Tensor = self.o_proj(attended) if folded is None else linear(attended, folded, self.o_proj.bias)
        return out

    def _query(self, hidden: Tensor) -> Tensor:
        query: Tensor
        if self.sizes.query_rank is None:
            query = self.q_proj(hidden)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        return query


@dataclass(frozen=True)
class OutputOperations:
    """Floating-point operations per decode token from attended latents to the hidden state.

    Attributes:
        apart: latents to values, H * L * V, and values to the hidden state, H * V * X; each is a product and a sum.
        folded: by one weight, H * L * X.
    """

    apart: int
    folded: int

    @staticmethod
    def of(hidden_size: int, num_heads: int, sizes: LatentSizes) -> OutputOperations:
        """Count them."""
        rank, value = sizes.kv_rank, sizes.value_dim
        return OutputOperations(
            apart=2 * num_heads * value * (rank + hidden_size), folded=2 * num_heads * rank * hidden_size
        )


@final
class LatentNorm(nn.Module):
    """RMS norm in float32, rounded before it is multiplied with the weight; over the last axis, of `size`."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., size] normed, in its own type."""
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return self.weight * normed


@final
class LatentRotary(nn.Module):
    """The angles of positions.

    Args:
        frequencies: [R / 2], of each pair of dimensions.
        scaling: what cosines and sines are multiplied with (yarn's attention factor).
    """

    inv_freq: Tensor

    def __init__(self, frequencies: Tensor, *, scaling: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", frequencies.float(), persistent=False)
        self.scaling = scaling

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, float32 [T, R / 2] both, of positions [T]."""
        angles = positions.unsqueeze(-1).float() * self.inv_freq
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def rotated(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate x [T, H, R] by angles given as [T, R / 2], in float32: all pairs' firsts, then all seconds, x's type."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    first, second, cos, sin = first.float(), second.float(), cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def paired(x: Tensor) -> Tensor:
    """Bring the halves (i, i + R / 2) of x [..., R] together as pairs (2i, 2i + 1)."""
    pairs: Tensor = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return pairs


def latent_sources(layer: MultiHeadLatentAttention, *, name: str) -> Sources:
    """Say how absorbed weights of a layer of that qualified name are made of a checkpoint's tensors."""
    sizes, heads = layer.sizes, layer.num_heads
    end = sizes.nope_dim + sizes.value_dim
    whole = Take(f"{name}.kv_b_proj.weight", (heads * end, sizes.kv_rank))
    sources: dict[str, Source] = {
        f"{name}.w_uk": HeadRows(whole, heads, 0, sizes.nope_dim),
        f"{name}.w_uv": HeadRows(whole, heads, sizes.nope_dim, end, transpose=True),
    }
    if layer.folds:
        out = Take(f"{name}.o_proj.weight", tuple(layer.o_proj.weight.shape))
        sources[f"{name}.w_vo"] = HeadProduct(out, HeadRows(whole, heads, sizes.nope_dim, end), heads)
    return sources


def _absorb(layer: nn.Module, _keys: object) -> None:
    """Keep absorbed weights in step with those that were loaded."""
    assert isinstance(layer, MultiHeadLatentAttention)
    layer.absorb()
