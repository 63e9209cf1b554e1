"""All of latent attention between its projections in one operator, `mla_attention`: what a compiler can't look into.

It runs the description of ops/mla/core.py, with the plain functions or with a kernel's. Shape suffixes as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from piecework.ops.ir.opaque_op import opaque_op
from piecework.ops.mla.core import LatentCores, Regime, latent_attention
from piecework.ops.mla.operators import PLAIN, check_same

MLA_ATTENTION_OP: Final = "piecework::mla_attention"


@dataclass(frozen=True)
class LatentAttention:
    """`piecework::mla_attention` over functions that `latent_attention` is made of, which it is called like."""

    cores: LatentCores

    def __call__(
        self,
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
        scale: float,
        kv_b_weight: Tensor,
        w_uk: Tensor,
        w_uv: Tensor,
    ) -> Tensor:
        """See `mla_attention`."""
        num_prefill_tokens = q_nope.shape[0] - num_decode_tokens
        regime = Regime.MIXED
        if num_prefill_tokens == 0:
            regime = Regime.DECODE
        elif num_decode_tokens == 0:
            regime = Regime.PREFILL
        return latent_attention(
            regime,
            self.cores,
            q_nope=q_nope,
            q_pe=q_pe,
            compressed=compressed,
            norm_weight=norm_weight,
            eps=eps,
            cos=cos,
            sin=sin,
            latent_cache=latent_cache,
            slot_mapping=slot_mapping,
            block_tables=block_tables,
            seq_lens=seq_lens,
            query_start=query_start,
            num_decode_tokens=num_decode_tokens,
            num_prefill_tokens=num_prefill_tokens,
            scale=scale,
            kv_b_weight=kv_b_weight,
            w_uk=w_uk,
            w_uv=w_uv,
        )


_PLAIN_ATTENTION: Final = LatentAttention(PLAIN)


@opaque_op(MLA_ATTENTION_OP, mutates=("latent_cache",))
def mla_attention(
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
    scale: float,
    kv_b_weight: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
) -> Tensor:
    """Do all of `latent_attention` (see its arguments) in one operator; which regime it is, the batch says.

    Returns:
        [T, H * V], contiguous, dtype of the queries.
    """
    return _PLAIN_ATTENTION(
        q_nope,
        q_pe,
        compressed,
        norm_weight,
        eps,
        cos,
        sin,
        latent_cache,
        slot_mapping,
        block_tables,
        seq_lens,
        query_start,
        num_decode_tokens,
        scale,
        kv_b_weight,
        w_uk,
        w_uv,
    )


@mla_attention.fake
def _mla_attention_fake(
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
    scale: float,
    kv_b_weight: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
) -> Tensor:
    num_tokens, num_heads, nope = q_nope.shape
    rank, value = w_uv.shape[1:]
    check_same(
        "kv_b_weight, against w_uk with w_uv", kv_b_weight.shape[0], num_heads * (nope + value), asked="mla_attention"
    )
    check_same("compressed, against w_uv and q_pe", compressed.shape[1], rank + q_pe.shape[2], asked="mla_attention")
    return q_nope.new_empty(num_tokens, num_heads * value)
