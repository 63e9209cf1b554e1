"""`piecework::attention`: write this step's keys and values to the paged cache, then attend over it.

The op is opaque to compilers. `attention_native` is its meaning, its default implementation and its test oracle; the
dispatcher calls it, and so does the plan executor where a bundle has no kernel for it (providers/cpu_attention).

Shape suffixes: T tokens of this step, S sequences, H query heads, K key/value heads, D head dim, N blocks,
B block size (tokens per block), W blocks per row of the block table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from piecework.errors import OpError
from piecework.ops.attention_plain import Scores, attend_with
from piecework.ops.ir.values import flattened
from piecework.ops.sequences import Sequences

ATTENTION_OP = "piecework::attention"

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, Tensor block_tables, "
    "Tensor seq_lens, Tensor query_start, SymInt num_decode_tokens, float scale, SymInt sliding_window=0, "
    "float softcap=0.0, Tensor? sinks=None, SymInt chunk=0, Tensor? key_bias=None) -> Tensor"
)


@flattened
def attention_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    sequences: Sequences,
    scores: Scores,
) -> Tensor:
    """Store key/value in the paged cache, then attend causally, each sequence over its own cached tokens.

    The first `num_decode_tokens` sequences have exactly one new token each; they are attended in one batched call.
    The rest are prefill, possibly in chunks.

    Args:
        query: [T, H, D], float32 | bfloat16 | float16, any strides; tokens grouped by sequence.
        key: [T, K, D], dtype of the cache; K divides H.
        value: [T, K, D], dtype of the cache.
        kv_cache: [2, N, B, K, D]; keys at 0, values at 1; written in place. What slots hold that belong to none of a
            sequence's visible tokens makes no difference, whatever it is.
        slot_mapping: [T] int64, block * B + offset of each new token.
        sequences: whose the tokens are.
        scores: what happens to scores.

    Returns:
        [T, H, D], contiguous, dtype of the query.
    """
    write_kv(key, value, kv_cache, slot_mapping)
    return attend_with(query, kv_cache, sequences, scores)


def write_kv(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store the new tokens' keys and values, both [T, K, D], in their slots of the paged cache."""
    keys, values = kv_cache.view(2, -1, kv_cache.shape[3], kv_cache.shape[4]).unbind(0)
    keys.index_copy_(0, slot_mapping, key)
    values.index_copy_(0, slot_mapping, value)


@flattened
def attend(query: Tensor, kv_cache: Tensor, sequences: Sequences, scores: Scores) -> Tensor:
    """Do what `attention_native` does, over a cache that holds the new tokens already; nothing is written."""
    return attend_with(query, kv_cache, sequences, scores)


@flattened
def attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    sequences: Sequences,
    scores: Scores,
) -> Tensor:
    """Return an empty tensor shaped like the op's output: [T, H, D], contiguous, dtype of the query.

    Raises OpError where shapes or types, as far as a trace knows them as numbers, can't go together.
    """
    tables, lens, starts, _ = sequences
    ranks = [t.dim() for t in (query, key, value, kv_cache, slot_mapping, tables, lens, starts)]
    if ranks != [3, 3, 3, 5, 1, 2, 1, 1]:
        raise _refused(f"tensors of {ranks} dimensions")
    if any(t.dtype is not torch.int64 for t in (slot_mapping, tables, lens, starts)):
        raise _refused("indices that are not int64")
    if not (query.dtype.is_floating_point and key.dtype is value.dtype is kv_cache.dtype):
        raise _refused(f"{query.dtype}, {key.dtype}, {value.dtype} and {kv_cache.dtype}")
    tokens, heads, dim = query.shape
    wanted = (tokens, *kv_cache.shape[3:])
    together = [*zip((*key.shape, *value.shape), (*wanted, *wanted), strict=True)]
    together += [(dim, kv_cache.shape[4]), (kv_cache.shape[0], 2), (slot_mapping.shape[0], tokens)]
    together += [(tables.shape[0], lens.shape[0])]
    if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in together):
        raise _refused("sizes that differ")
    return query.new_empty((tokens, heads, dim))


def _refused(found: str) -> OpError:
    return OpError(asked="trace attention", found=found, try_="tensors as attention_native takes them")


def register() -> None:
    """Put the op in torch's registry, once per process; a second call changes nothing."""
    if hasattr(torch.ops.piecework, "attention"):
        return
    torch.library.define(ATTENTION_OP, _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(ATTENTION_OP, ("CPU", "CUDA"), attention_native)
    torch.library.register_fake(ATTENTION_OP, attention_fake)


register()
