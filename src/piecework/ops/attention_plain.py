"""Attention over a paged cache in plain torch: the meaning of `piecework::attention`, and what runs without a kernel.

Only slots with tokens that a sequence can see are read: others may hold what another sequence left there, NaN included,
which a weight of zero would not undo. Where a batch needs padding, a sequence's newest token stands in.

Shape suffixes: T tokens, S sequences, H query heads, K key/value heads, G = H / K, D head dim, L keys of a sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from piecework.errors import OpError
from piecework.ops.sequences import Sequences

_UNEVEN = 4  # sequences shorter than the longest by this factor are attended apart, so that padding stays small


class Scores(NamedTuple):
    """What happens to scores.

    Attributes:
        scale: their factor before the softmax.
        sliding_window: a token sees itself and this many minus one before it; 0 means all.
        softcap: scores become softcap * tanh(score / softcap); 0 means off.
        sinks: [H], a further score for each head that takes part in the softmax and has no value; or None.
        chunk: a token sees none before the last multiple of this many tokens of its sequence; 0 means all.
        key_bias: [H, P], any floating type, for P positions; to a token's score for a key is added, at the end, the
            bias of the key's position less that of the token's own (ALiBi, arXiv:2108.12409); or None.
    """

    scale: float
    sliding_window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    chunk: int = 0
    key_bias: Tensor | None = None


def attend_with(query: Tensor, kv_cache: Tensor, sequences: Sequences, scores: Scores) -> Tensor:
    """Attend the new tokens of a batch, [T, H, D] -> [T, H, D], contiguous; see `ops/attention.py`."""
    block_tables, seq_lens, query_start, num = sequences
    if num == query.shape[0]:
        return decode(query, kv_cache, block_tables, seq_lens, scores).contiguous()
    if num == 0:
        return prefill(query, kv_cache, block_tables, seq_lens, query_start, scores)
    return torch.cat(
        [
            decode(query[:num], kv_cache, block_tables[:num], seq_lens[:num], scores),
            prefill(query[num:], kv_cache, block_tables[num:], seq_lens[num:], query_start[num:], scores),
        ]
    )


def decode(query: Tensor, kv_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, scores: Scores) -> Tensor:
    """Attend one query token per sequence, over its whole cache: [S, H, D] -> [S, H, D]."""
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[3]
    if query.is_cpu:
        longest, shortest = int(seq_lens.max()), int(seq_lens.min())
        if shortest * _UNEVEN < longest:
            return _decode_apart(query, kv_cache, block_tables, seq_lens, scores, longest=longest)
    else:  # asking would wait for the device
        longest, shortest = block_tables.shape[1] * kv_cache.shape[2], 0
    span = min(longest, scores.sliding_window or longest, scores.chunk or longest)
    mask = bias = None
    # Aligned at their ends, so that a window is the same columns for all sequences.
    positions = seq_lens.unsqueeze(1) + torch.arange(-span, 0, device=query.device)
    if shortest == longest and not scores.chunk:
        keys, values = _gather_blocks(kv_cache, block_tables, longest - span, longest)
    else:
        if shortest < span or scores.chunk:
            newest = seq_lens.unsqueeze(1) - 1
            seen = positions >= (newest - newest % scores.chunk if scores.chunk else 0)
            mask = seen.view(num_seqs, 1, 1, span)
            positions = torch.where(seen, positions, newest)
        keys, values = _gather_tokens(kv_cache, block_tables, positions)
    if scores.key_bias is not None:
        biases = scores.key_bias.float()
        bias = biases[:, positions] - biases[:, seq_lens - 1].unsqueeze(2)
        bias = bias.transpose(0, 1).unflatten(1, (num_kv_heads, -1))
    # The query heads that share a key/value head become the rows of one matrix.
    grouped = query.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if num_heads == num_kv_heads and query.is_cpu and query.dtype != torch.float32:
        # One row per key/value head: torch's CPU kernel is 1.5 to 4 times slower in half precision than in float32.
        grouped, keys, values = grouped.float(), keys.float(), values.float()
    sinks = None if scores.sinks is None else scores.sinks.view(1, num_kv_heads, -1, 1)
    out = _attend(grouped, keys, values, mask, scores, sinks=sinks, bias=bias, causal=False)
    return out.to(query.dtype).reshape(query.shape)


def _decode_apart(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, scores: Scores, *, longest: int
) -> Tensor:
    """Attend short sequences and long ones in two calls."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    short = seq_lens * _UNEVEN < longest
    for rows in (short.nonzero().squeeze(1), (~short).nonzero().squeeze(1)):
        out[rows] = decode(query[rows], kv_cache, block_tables[rows], seq_lens[rows], scores)
    return out


def prefill(
    query: Tensor, kv_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, query_start: Tensor, scores: Scores
) -> Tensor:
    """Attend the new tokens of sequences, [T, H, D] -> [T, H, D]; `query_start` begins with the first one's first.

    Sequences with as many new and as many cached tokens are attended together. Raises OpError where `query_start`
    doesn't divide the tokens among the sequences.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    starts, lengths = (query_start - query_start[0]).tolist(), seq_lens.tolist()
    if len(starts) != len(lengths) + 1 or starts[-1] != query.shape[0]:  # rows would be left as they are in memory
        raise OpError(
            asked=f"attention of {query.shape[0]} new tokens in {len(lengths)} sequences",
            found=f"{len(starts)} places in query_start, the last of which is {starts[-1]}",
            try_="give where each sequence's tokens begin, and where the last one's end",
        )
    alike: dict[tuple[int, int], list[int]] = {}
    for index, length in enumerate(lengths):
        if starts[index] < starts[index + 1]:
            alike.setdefault((starts[index + 1] - starts[index], length), []).append(index)
    for (num_new, length), members in alike.items():
        first = length - num_new
        begin = max(0, first - scores.sliding_window + 1) if scores.sliding_window else 0
        begin = max(begin, first - first % scores.chunk) if scores.chunk else begin
        if len(members) == 1:
            rows = slice(starts[members[0]], starts[members[0]] + num_new)
            keys, values = _gather_blocks(kv_cache, block_tables[members[0]].unsqueeze(0), begin, length)
            out[rows] = _prefill_alike(query[rows].unsqueeze(0), keys, values, scores, begin=begin).squeeze(0)
        else:
            rows_of = torch.tensor([starts[i] for i in members], device=query.device)
            tokens = rows_of.unsqueeze(1) + torch.arange(num_new, device=query.device)
            keys, values = _gather_blocks(kv_cache, block_tables[members], begin, length)
            out[tokens] = _prefill_alike(query[tokens], keys, values, scores, begin=begin)
    return out


def _prefill_alike(query: Tensor, keys: Tensor, values: Tensor, scores: Scores, *, begin: int) -> Tensor:
    """Attend the last T of L tokens of each sequence: query [S, T, H, D], keys/values [S, L, K, D] -> [S, T, H, D].

    The first of the keys is that of the sequence's token number `begin`.
    """
    num_seqs, num_new, num_heads, head_dim = query.shape
    _, length, num_kv_heads, _ = keys.shape
    num_groups = num_heads // num_kv_heads
    # S and K are the batch and G the heads, so that shared keys are a stride of zero and not a copy.
    grouped = query.reshape(num_seqs, num_new, num_kv_heads, num_groups, head_dim).permute(0, 2, 3, 1, 4).flatten(0, 1)
    keys, values = (t.transpose(1, 2).flatten(0, 1).unsqueeze(1).expand(-1, num_groups, -1, -1) for t in (keys, values))
    causal = num_new == length and not (
        0 < scores.sliding_window < length
        or 0 < scores.chunk < begin + length
        or scores.softcap
        or scores.sinks is not None
        or scores.key_bias is not None
    )
    mask = None
    if not causal:
        distance = torch.arange(length - num_new, length, device=query.device).unsqueeze(1)
        distance = distance - torch.arange(length, device=query.device)
        mask = distance >= 0
        if scores.sliding_window:
            mask = mask & (distance < scores.sliding_window)
        if scores.chunk:
            chunks = torch.arange(begin, begin + length, device=query.device) // scores.chunk
            mask = mask & (chunks[length - num_new :].unsqueeze(1) == chunks)
    sinks = bias = None
    if scores.sinks is not None:
        sinks = scores.sinks.view(num_kv_heads, num_groups, 1, 1).repeat(num_seqs, 1, 1, 1)
    if scores.key_bias is not None:
        biases = scores.key_bias[:, begin : begin + length].float().unflatten(0, (num_kv_heads, num_groups))
        bias = (biases.unsqueeze(2) - biases[..., length - num_new :].unsqueeze(3)).repeat(num_seqs, 1, 1, 1)
    out = _attend(grouped, keys, values, mask, scores, sinks=sinks, bias=bias, causal=causal)
    by_token: Tensor = out.unflatten(0, (num_seqs, num_kv_heads)).permute(0, 3, 1, 2, 4)
    return by_token.reshape(query.shape)


def _gather_blocks(kv_cache: Tensor, block_tables: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Copy keys and values `begin` to `end` of all sequences out of their blocks: two tensors [S, L, K, D]."""
    block_size = kv_cache.shape[2]
    first = begin // block_size
    blocks = block_tables[:, first : -(-end // block_size)]
    taken = kv_cache.index_select(1, blocks.flatten()).unflatten(1, blocks.shape).flatten(2, 3)
    keys, values = taken[:, :, begin - first * block_size : end - first * block_size].unbind(0)
    return keys, values


def _gather_tokens(kv_cache: Tensor, block_tables: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Copy keys and values at `positions` [S, L] out of their blocks: two tensors [S, L, K, D]."""
    block_size = kv_cache.shape[2]
    slots = block_tables.gather(1, positions // block_size) * block_size + positions % block_size
    keys, values = kv_cache.flatten(1, 2).index_select(1, slots.flatten()).unflatten(1, positions.shape).unbind(0)
    return keys, values


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scores: Scores,
    *,
    sinks: Tensor | None,
    bias: Tensor | None,
    causal: bool,
) -> Tensor:
    """Attend, all [.., .., rows or L, D]; `causal` stands for a mask.

    `sinks` broadcasts to [.., .., rows, 1], `bias` is [.., .., rows, L] in float32.
    """
    if not scores.softcap and sinks is None and bias is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal, scale=scores.scale)
    # torch's fused kernels know neither cap nor sinks, and biases in the query's type only
    logits = torch.matmul(query, keys.transpose(-1, -2)).float() * scores.scale
    if scores.softcap:
        logits = torch.tanh(logits / scores.softcap) * scores.softcap
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.float().expand(*logits.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : keys.shape[-2]]
    return torch.matmul(weights.to(query.dtype), values)
