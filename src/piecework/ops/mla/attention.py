"""All of latent attention between its projections in one operator, `mla_attention`: what a compiler can't look into.

It runs the description of ops/mla/core.py, with the plain functions or with a kernel's. Shape suffixes as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import Tensor

from piecework.ops.ir.opaque_op import opaque_op
from piecework.ops.ir.values import flattened
from piecework.ops.mla.core import LatentCores, LatentWeights, NewLatents, Queries, Regime, latent_attention
from piecework.ops.mla.operators import PLAIN, check_same
from piecework.ops.sequences import Sequences

MLA_ATTENTION_OP: Final = "piecework::mla_attention"


def whole_attention(cores: LatentCores) -> Callable[..., Tensor]:
    """Return what `mla_attention` does, made of these functions."""

    @flattened
    def attention(
        q_nope: Tensor, q_pe: Tensor, new: NewLatents, sequences: Sequences, scale: float, weights: LatentWeights
    ) -> Tensor:
        num_prefill_tokens = q_nope.shape[0] - sequences.num_decode_tokens
        regime = Regime.MIXED
        if num_prefill_tokens == 0:
            regime = Regime.DECODE
        elif sequences.num_decode_tokens == 0:
            regime = Regime.PREFILL
        return latent_attention(
            regime,
            cores,
            queries=Queries(q_nope, q_pe),
            new=new,
            sequences=sequences,
            num_prefill_tokens=num_prefill_tokens,
            scale=scale,
            weights=weights,
        )

    return attention


_PLAIN_ATTENTION: Final = whole_attention(PLAIN)


@opaque_op(MLA_ATTENTION_OP, mutates=("latent_cache",))
@flattened
def mla_attention(
    q_nope: Tensor, q_pe: Tensor, new: NewLatents, sequences: Sequences, scale: float, weights: LatentWeights
) -> Tensor:
    """Do all of `latent_attention` (see its arguments) in one operator; which regime it is, the batch says.

    Queries are rotated, halves apart; `w_uv` is given.

    Returns:
        [T, H * V], contiguous, dtype of the queries.
    """
    return _PLAIN_ATTENTION(q_nope, q_pe, *new, *sequences, scale, *weights)


@mla_attention.fake
@flattened
def _mla_attention_fake(
    q_nope: Tensor, q_pe: Tensor, new: NewLatents, sequences: Sequences, scale: float, weights: LatentWeights
) -> Tensor:
    num_tokens, num_heads, nope = q_nope.shape
    assert weights.w_uv is not None
    rank, value = weights.w_uv.shape[1:]
    rows = num_heads * (nope + value)
    check_same("kv_b_weight, against w_uk with w_uv", weights.kv_b_weight.shape[0], rows, asked="mla_attention")
    width = rank + q_pe.shape[2]
    check_same("compressed, against w_uv and q_pe", new.compressed.shape[1], width, asked="mla_attention")
    return q_nope.new_empty(num_tokens, num_heads * value)
