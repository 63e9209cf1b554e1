"""`piecework::attention`: write this step's keys and values to the paged cache, then attend over it.

The op is opaque to compilers. `attention_native` is its meaning, its default implementation and its test oracle; the
plan executor calls it directly as a plain function, the dispatcher calls the very same one.

Shape suffixes: T tokens of this step, S sequences, H query heads, K key/value heads, G = H / K, D head dim,
N blocks, B block size (tokens per block), W blocks per row of the block table, L cached tokens of one sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ATTENTION_OP = "piecework::attention"

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, Tensor block_tables, "
    "Tensor seq_lens, Tensor query_start, SymInt num_decode_tokens, float scale, SymInt sliding_window=0, "
    "float softcap=0.0) -> Tensor"
)


def attention_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    num_decode_tokens: int,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Store key/value in the paged cache, then attend causally, each sequence over its own cached tokens.

    The first `num_decode_tokens` sequences have exactly one new token each; they are attended in one batched call.
    The rest (prefill, possibly in chunks) are attended one after the other.

    Args:
        query: [T, H, D], float32 | bfloat16 | float16, any strides; tokens grouped by sequence.
        key: [T, K, D], dtype of the cache; K divides H.
        value: [T, K, D], dtype of the cache.
        kv_cache: [2, N, B, K, D]; keys at 0, values at 1; written in place. Allocate it with zeros: slots that no token
            was written to get weight zero, which only finite values survive.
        slot_mapping: [T] int64, block * B + offset of each new token.
        block_tables: [S, W] int64; row s lists the blocks of sequence s, padded with any valid block.
        seq_lens: [S] int64, tokens in the cache after this step, at least 1.
        query_start: [S + 1] int64, prefix sums of the new tokens per sequence.
        num_decode_tokens: number of leading sequences with one new token each.
        scale: factor of the scores before the softmax.
        sliding_window: a token sees itself and this many minus one before it; 0 means all.
        softcap: scores become softcap * tanh(score / softcap); 0 means off.

    Returns:
        [T, H, D], contiguous, dtype of the query.
    """
    write_kv(key, value, kv_cache, slot_mapping)
    return attend(
        query,
        key,
        value,
        kv_cache,
        block_tables,
        seq_lens,
        query_start,
        num_decode_tokens,
        scale,
        sliding_window,
        softcap,
    )


def write_kv(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store the new tokens' keys and values, both [T, K, D], in their slots of the paged cache."""
    keys, values = kv_cache.view(2, -1, kv_cache.shape[3], kv_cache.shape[4]).unbind(0)
    keys.index_copy_(0, slot_mapping, key)
    values.index_copy_(0, slot_mapping, value)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    num_decode_tokens: int,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Do what `attention_native` does, over a cache that holds the new tokens already; nothing is written."""
    num_tokens = query.shape[0]
    if num_decode_tokens == num_tokens:
        return _decode(query, kv_cache, block_tables, seq_lens, scale, sliding_window, softcap)
    outputs = []
    if num_decode_tokens:
        tables, lens = block_tables[:num_decode_tokens], seq_lens[:num_decode_tokens]
        outputs.append(_decode(query[:num_decode_tokens], kv_cache, tables, lens, scale, sliding_window, softcap))
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for index in range(num_decode_tokens, len(lengths)):
        new, length = slice(starts[index], starts[index + 1]), lengths[index]
        if new.start == new.stop:
            continue
        if length == new.stop - new.start:
            keys, values = key[new], value[new]
        else:
            keys, values = _gather(kv_cache, block_tables[index], length)
        outputs.append(_prefill(query[new], keys, values, scale, sliding_window, softcap))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def attention_fake(query: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    """Return an empty tensor shaped like the op's output: [T, H, D], contiguous, dtype of the query."""
    return query.new_empty(query.shape)


def _decode(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    """Attend one query token per sequence: [S, H, D] -> [S, H, D]."""
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[3]
    mask = None
    if num_seqs == 1 and not query.is_cuda:
        # One sequence needs no mask: the gathered cache is cut to its length. Off the host this would synchronise.
        length = int(seq_lens.item())
        keys, values = _gather(kv_cache, block_tables[0], length)
        if 0 < window < length:
            keys, values = keys[length - window :], values[length - window :]
        keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    else:
        gathered = kv_cache.index_select(1, block_tables.reshape(-1))
        keys, values = gathered.view(2, num_seqs, -1, num_kv_heads, head_dim).transpose(2, 3).unbind(0)
        position = torch.arange(keys.shape[2], device=query.device)
        ends = seq_lens.unsqueeze(1)
        mask = position < ends
        if window:
            mask = mask & (position >= ends - window)
        mask = mask[:, None, None, :]
    # The query heads that share a key/value head become the rows of one matrix.
    grouped = query.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if num_heads == num_kv_heads and query.is_cpu and query.dtype != torch.float32:
        # One row per key/value head: torch's CPU kernel is 1.5 to 4 times slower in half precision than in float32.
        grouped, keys, values = grouped.float(), keys.float(), values.float()
    if softcap:
        out = _attend_softcap(grouped, keys, values, mask, scale, softcap)
    else:
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.to(query.dtype).reshape(query.shape).contiguous()


def _prefill(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """Attend the last T tokens of one sequence: query [T, H, D], keys/values [L, K, D] -> [T, H, D]."""
    num_new, num_heads, head_dim = query.shape
    length, num_kv_heads, _ = keys.shape
    num_groups = num_heads // num_kv_heads
    # K is the batch and G the heads, so that shared keys are a stride of zero and not a copy.
    grouped = query.view(num_new, num_kv_heads, num_groups, head_dim).permute(1, 2, 0, 3)
    keys = keys.transpose(0, 1).unsqueeze(1).expand(-1, num_groups, -1, -1)
    values = values.transpose(0, 1).unsqueeze(1).expand(-1, num_groups, -1, -1)
    mask = None
    plain = num_new == length and not 0 < window < length
    if not plain or softcap:
        distance = torch.arange(length - num_new, length, device=query.device).unsqueeze(1)
        distance = distance - torch.arange(length, device=query.device)
        mask = distance >= 0
        if window:
            mask = mask & (distance < window)
    if softcap:
        out = _attend_softcap(grouped, keys, values, mask, scale, softcap)
    else:
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(query.shape).contiguous()


def _gather(kv_cache: Tensor, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Copy one sequence's cached keys and values out of its blocks: two tensors [length, K, D]."""
    block_size = kv_cache.shape[2]
    num_blocks = (length + block_size - 1) // block_size
    keys, values = kv_cache.index_select(1, block_table[:num_blocks]).flatten(1, 2).unbind(0)
    return keys[:length], values[:length]


def _attend_softcap(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Plain attention with capped scores, softmax in float32; the fused kernels know no cap."""
    scores = torch.matmul(query, keys.transpose(-1, -2)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), values)


def register() -> None:
    """Put the op in torch's registry, once per process; a second call changes nothing."""
    if hasattr(torch.ops.piecework, "attention"):
        return
    torch.library.define(ATTENTION_OP, _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(ATTENTION_OP, ("CPU", "CUDA"), attention_native)
    torch.library.register_fake(ATTENTION_OP, attention_fake)


register()
