"""`piecework::layer_attention` and `piecework::kv_write`: attention that finds its KV cache by the layer's name.

The cache is the layer's state in the running forward context, and the batch's block tables are that context's too, so
that nothing but query, key and value passes through the graph. See `ops/attention.py` for the meaning and the shapes.

Written apart, by `kv_write`, keys and values are stored by an operator of its own; its result, an empty token, is then
given to `layer_attention` as `after`, which orders the two and keeps the write in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from piecework.ops.attention import attend, attention_native, write_kv
from piecework.ops.attention_plain import Scores
from piecework.ops.ir.forward_context import Batch, layer_state, running_context
from piecework.ops.ir.layer import LayerNameType
from piecework.ops.ir.opaque_op import opaque_op
from piecework.ops.ir.values import flattened

LAYER_ATTENTION_OP: Final = "piecework::layer_attention"


@dataclass(frozen=True)
class AttentionState:
    """What the forward context holds for an attention layer; layers that share keys and values hold the same cache.

    Attributes:
        kv_cache: [2, N, B, K, D], allocated with zeros.
    """

    kv_cache: Tensor


def layered(attention: Callable[..., Tensor], attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what `piecework::layer_attention` does, by what stores and attends, and by what only attends."""

    @flattened
    def run(
        query: Tensor, key: Tensor, value: Tensor, layer: LayerNameType, scores: Scores, after: Tensor | None = None
    ) -> Tensor:
        cache = layer_state(layer, AttentionState).kv_cache
        batch: Batch = running_context().batch
        sequences = (batch.block_tables, batch.seq_lens, batch.query_start, batch.num_decode_tokens)
        if after is None:
            return attention(query, key, value, cache, batch.slot_mapping, *sequences, *scores)
        return attend(query, cache, *sequences, *scores)

    return run


_PLAIN: Final = layered(attention_native, attend)


@opaque_op(LAYER_ATTENTION_OP)
@flattened
def layer_attention(
    query: Tensor, key: Tensor, value: Tensor, layer: LayerNameType, scores: Scores, after: Tensor | None = None
) -> Tensor:
    """Store key and value in the layer's cache, unless `after` says that they are, and attend over it.

    Args:
        query: [T, H, D], float32 | bfloat16 | float16.
        key: [T, K, D].
        value: [T, K, D].
        layer: the layer whose `AttentionState` is used.
        scores: what happens to scores.
        after: what `kv_write` gave for the same keys and values, or None.

    Returns:
        [T, H, D], contiguous, dtype of the query.

    Raises OpError outside of a forward context, and where it has no attention layer of that name.
    """
    return _PLAIN(query, key, value, layer, *scores, after)


@layer_attention.fake
def _layer_attention_fake(query: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return query.new_empty(query.shape)


@opaque_op("piecework::kv_write")
def kv_write(key: Tensor, value: Tensor, layer: LayerNameType) -> Tensor:
    """Store key and value, both [T, K, D], in the layer's cache; returns an empty token [0] for `after`.

    Raises OpError outside of a forward context, and where it has no attention layer of that name.
    """
    write_kv(key, value, layer_state(layer, AttentionState).kv_cache, running_context().batch.slot_mapping)
    return key.new_empty(0)


@kv_write.fake
def _kv_write_fake(key: Tensor, value: Tensor, layer: LayerNameType) -> Tensor:
    return key.new_empty(0)
