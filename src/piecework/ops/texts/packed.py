"""`piecework::packed_attention` and `piecework::packed_reduce`: whole texts one after the other, without padding.

A batch of texts is one row of tokens. `query_start` says where each text begins: what is computed for a text depends
on its own tokens only. Texts of the same length are computed together.

Shape suffixes: T tokens, S texts, H query heads, K key/value heads, D head dim, L tokens of a text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from piecework.errors import OpError
from piecework.ops.ir.opaque_op import opaque_op

PACKED_ATTENTION_OP: Final = "piecework::packed_attention"


@opaque_op(PACKED_ATTENTION_OP)
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start: Tensor,
    scale: float,
    window: int = 0,
    causal: bool = False,  # noqa: FBT001, FBT002  operators take their arguments by place
) -> Tensor:
    """Attend, each token over its own text.

    Args:
        query: [T, H, D], float32 | bfloat16 | float16, any strides.
        key: [T, K, D]; K divides H.
        value: [T, K, D].
        query_start: [S + 1] int64, prefix sums of the texts' tokens.
        scale: the scores' factor before the softmax.
        window: a token sees those less than this many places away; 0 means all.
        causal: whether a token sees none behind itself.

    Returns:
        [T, H, D], contiguous, dtype of the query.

    Raises OpError where `query_start` doesn't divide the tokens among texts.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for _, rows, length in _alike(query_start, num_tokens=query.shape[0]):
        q, k, v = (t[rows].unflatten(0, (-1, length)).transpose(1, 2) for t in (query, key, value))
        mask = _mask(length, window, causal=causal, device=query.device) if 0 < window < length else None
        shared = k.shape[1] != q.shape[1]
        attended = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=shared
        )
        out[rows] = attended.transpose(1, 2).flatten(0, 1)
    return out


@packed_attention.fake
def _packed_attention_fake(query: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return query.new_empty(query.shape)


@opaque_op("piecework::packed_reduce")
def packed_reduce(x: Tensor, query_start: Tensor, largest: bool = False) -> Tensor:  # noqa: FBT001, FBT002
    """Return each text's mean, or with `largest` its maximum, over its tokens: [T, D] -> [S, D], of the same dtype.

    Means are computed in float32. Raises OpError where `query_start` doesn't divide the tokens among texts.
    """
    out = x.new_empty(query_start.shape[0] - 1, x.shape[1])
    for texts, rows, length in _alike(query_start, num_tokens=x.shape[0]):
        tokens = x[rows].unflatten(0, (-1, length))
        out[texts] = tokens.amax(1) if largest else tokens.mean(1, dtype=torch.float32).to(x.dtype)
    return out


@packed_reduce.fake
def _packed_reduce_fake(x: Tensor, query_start: Tensor, largest: bool = False) -> Tensor:  # noqa: FBT001, FBT002
    return x.new_empty(query_start.shape[0] - 1, x.shape[1])


_Rows = slice | Tensor


def _alike(query_start: Tensor, *, num_tokens: int) -> Iterator[tuple[_Rows, _Rows, int]]:
    """Yield which texts have one length, the rows of their tokens, text by text, and that length.

    Raises OpError where that isn't so for every text: one has no token, or tokens belong to none.
    """
    starts = query_start.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(starts)]
    if not lengths or starts[0] != 0 or starts[-1] != num_tokens or min(lengths) < 1:
        raise OpError(
            asked=f"{len(lengths)} texts of {num_tokens} tokens",
            found=f"texts that begin at {starts[:8]}{' …' if len(starts) > 8 else ''}",
            try_="give where each text's tokens begin, and where the last one's end; a text has a token at least",
        )
    alike: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        alike.setdefault(length, []).append(number)
    for length, members in alike.items():
        first, end = members[0], members[-1] + 1
        if end - first == len(members):
            yield slice(first, end), slice(starts[first], starts[end]), length
        else:
            texts = torch.tensor(members, device=query_start.device)
            places = torch.arange(length, device=query_start.device)
            yield texts, (query_start[texts].unsqueeze(1) + places).flatten(), length


def _mask(length: int, window: int, *, causal: bool, device: torch.device) -> Tensor:
    """Return which tokens of a text see which: [L, L] bool."""
    place = torch.arange(length, device=device)
    distance = place.unsqueeze(1) - place
    return (distance.abs() < window) & (distance >= 0) if causal else distance.abs() < window
