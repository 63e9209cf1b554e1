"""Multi-head latent attention's cores in plain torch: what the operators of `ops/mla/operators.py` mean.

Only slots with tokens that a sequence can see are read: others may hold what another sequence left there, NaN included,
which a weight of zero would not undo. Where a batch needs padding, a sequence's newest token stands in.

Shape suffixes as in `ops/mla/core.py`; C tokens of a chunk of context, n new tokens of one sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from piecework.errors import OpError
from piecework.ops.ir.values import flattened
from piecework.ops.mla import cache as mla_cache
from piecework.ops.mla.core import ROTATED, Angles, NewLatents
from piecework.ops.packed import unpacked_linear
from piecework.ops.sequences import Sequences

CONTEXT_CHUNK: Final = 2048  # tokens that are expanded at once, of all sequences together
_GATHERED: Final = 4096  # latents that are gathered at once; more would leave the caches on the way
_UNEVEN: Final = 4  # sequences shorter than the longest by this factor are attended apart, so that padding stays small
_SHORT: Final = 64  # … unless all are as short as this
_SCORES: Final = 1 << 23  # that are held at once, in float32


class Prompts(NamedTuple):
    """The new tokens of `mla_prefill`.

    Attributes:
        q_nope: [T, H, N], float32 | bfloat16 | float16, any strides.
        q_pe: [T, H, R], any strides; rotated as `mla_write` leaves keys, or, where angles are given, pairs (2i, 2i + 1)
            yet to be rotated.
        kv: [P, H * (N + V)], the prompts' new latents expanded by `kv_b_weight`.
        entry: [T, L + R], what `mla_write` returned.
    """

    q_nope: Tensor
    q_pe: Tensor
    kv: Tensor
    entry: Tensor


@flattened
def write(new: NewLatents) -> Tensor:
    """Do what `mla_write` does."""
    compressed, norm_weight, eps, cos, sin, latent_cache, slot_mapping = new
    rank = norm_weight.shape[0]
    latent = compressed[:, :rank].float()
    latent = latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + eps)
    entry = torch.empty_like(compressed, memory_format=torch.contiguous_format)
    entry[:, :rank] = norm_weight * latent.to(compressed.dtype)
    even, odd = compressed[:, rank:].float().unflatten(1, (-1, 2)).unbind(2)
    half = even.shape[1]
    entry[:, rank : rank + half] = even * cos - odd * sin
    entry[:, rank + half :] = odd * cos + even * sin
    return mla_cache.put(entry, rank, latent_cache, slot_mapping)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (2i, 2i + 1) of x [T, H, R] as `write` does keys: all firsts, then all seconds."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1).to(x.dtype)


@flattened
def write_decode(
    q_latent: Tensor,
    q_pe: Tensor,
    turned: bool,  # noqa: FBT001  an operator's arguments come in order
    new: NewLatents,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    """Do what `mla_write_decode` does."""
    entry = write(*new)
    q_pe = q_pe if turned else rotate(q_pe, new.cos, new.sin)
    return decode(q_latent, q_pe, entry, new.latent_cache, block_tables, seq_lens, scale)


@flattened
def decode(
    q_latent: Tensor,
    q_pe: Tensor,
    entry: Tensor | None,
    latent_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    angles: Angles = ROTATED,
) -> Tensor:
    """Do what `mla_decode` does, sequences of similar length together."""
    num, _, rank = q_latent.shape
    q_pe = _rotated(q_pe[:num], angles, asked="mla_decode")
    out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    query = torch.cat([q_latent, q_pe[:num]], dim=-1)
    groups: list[tuple[slice | Tensor, int, int]] = []  # which sequences, and how long the longest and the shortest is
    if query.is_cpu:
        lengths = seq_lens[:num].tolist()
        for members in _alike(lengths):
            which = slice(0, num) if len(members) == num else torch.tensor(members)
            groups.append((which, lengths[members[0]], lengths[members[-1]]))
    elif num:  # asking for lengths would wait for the device
        groups.append((slice(0, num), block_tables.shape[1] * latent_cache.shape[1], 0))
    for which, longest, shortest in groups:
        positions = torch.arange(longest, device=query.device).expand(seq_lens[:num][which].shape[0], longest)
        mask = None
        if shortest < longest:
            last = seq_lens[:num][which].unsqueeze(1) - 1
            mask = (positions <= last).unsqueeze(1).unsqueeze(1)
            positions = torch.minimum(positions, last)
        keys = _gather(latent_cache, block_tables[:num][which], positions, rank=rank, like=query).unsqueeze(1)
        # All heads share a key: they are the rows of one matrix. The last R of the values are of no use.
        attended = scaled_dot_product_attention(query[which].unsqueeze(1), keys, keys, attn_mask=mask, scale=scale)
        out[which] = attended.squeeze(1)[..., :rank]
    return out


@flattened
def prefill(
    prompts: Prompts,
    kv_b_weight: Tensor,
    latent_cache: Tensor,
    sequences: Sequences,
    scale: float,
    decode_out: Tensor | None = None,
    angles: Angles = ROTATED,
    packed: bool = False,  # noqa: FBT001, FBT002
) -> Tensor:
    """Do what `mla_prefill` does, one sequence after the other."""
    q_nope, q_pe, kv, entry = prompts
    block_tables, seq_lens, query_start, num_decode_tokens = sequences
    q_pe = _rotated(q_pe, angles, asked="mla_prefill")
    num_tokens, num_heads, nope = q_nope.shape
    rank = kv_b_weight.shape[1]
    expand = _Expansion(kv_b_weight, packed=packed, num_heads=num_heads, nope=nope)
    num_decoded = 0 if decode_out is None else decode_out.shape[0]
    if num_decoded != num_decode_tokens:  # rows that nobody writes would have what was in memory
        raise OpError(
            asked=f"mla_prefill after {num_decode_tokens} decode tokens",
            found=f"a decode_out of {num_decoded} rows",
            try_="pass a row for each",
        )
    out = q_nope.new_empty(num_tokens, num_heads, expand.value)
    if decode_out is not None:
        out[:num_decode_tokens] = decode_out.view(num_decode_tokens, num_heads, expand.value)
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for index in range(num_decode_tokens, len(lengths)):
        tokens = slice(starts[index], starts[index + 1])
        num_new = tokens.stop - tokens.start
        if num_new == 0:
            continue
        query = torch.cat([q_nope[tokens], q_pe[tokens]], dim=-1).transpose(0, 1)
        new = slice(tokens.start - num_decode_tokens, tokens.stop - num_decode_tokens)
        keys, values = expand.heads(kv[new], entry[tokens, rank:])
        context = lengths[index] - num_new
        if context == 0:
            out[tokens] = _causal(query, keys, values, scale).transpose(0, 1)
            continue
        so_far = _attend(query, keys, values, scale, causal=True)
        for begin in range(0, context, CONTEXT_CHUNK):
            positions = torch.arange(begin, min(begin + CONTEXT_CHUNK, context), device=query.device).unsqueeze(0)
            cached = _gather(latent_cache, block_tables[index : index + 1], positions, rank=rank, like=entry)[0]
            keys, values = expand.heads(linear(cached[:, :rank], expand.weight), cached[:, rank:])
            so_far = so_far.merged(_attend(query, keys, values, scale, causal=False))
        out[tokens] = so_far.out.transpose(0, 1)
    return out.flatten(1)


def _rotated(q_pe: Tensor, angles: Angles, *, asked: str) -> Tensor:
    """Return q_pe [D, H, R] rotated by the angles of the first D tokens, or itself where there are none."""
    check_angles(angles, rope=q_pe.shape[2], asked=asked)
    cos, sin = angles
    if cos is None or sin is None:
        return q_pe
    return rotate(q_pe, cos[: q_pe.shape[0]], sin[: q_pe.shape[0]])


def check_angles(angles: Angles, *, rope: int, asked: str) -> None:
    """Raise OpError unless there are both, [T, R / 2], or none."""
    if angles.cos is None and angles.sin is None:
        return
    found = [None if given is None else list(given.shape) for given in angles]
    if found[0] != found[1] or found[0] is None or len(found[0]) != 2 or 2 * found[0][1] != rope:
        raise OpError(
            asked=f"{asked} of queries with {rope} rotary dimensions",
            found=f"cos {found[0]} and sin {found[1]}",
            try_=f"both of [tokens, {rope // 2}], or neither",
        )


class _Attended(NamedTuple):
    """What attention over some of the keys gave: out [H, n, V] and the logarithm of the weights' sum [H, n]."""

    out: Tensor
    log_sum: Tensor

    def merged(self, other: _Attended) -> _Attended:
        """Return what attention over the keys of both gives."""
        log_sum = torch.logaddexp(self.log_sum, other.log_sum)
        mine, others = (torch.exp(part.log_sum - log_sum).unsqueeze(-1) for part in (self, other))
        return _Attended(self.out * mine + other.out * others, log_sum)


class _Expansion:
    """From rows of expanded latents, [C, H * (N + V)], to keys [H, C, N + R] and values [H, C, V]."""

    def __init__(self, kv_b_weight: Tensor, *, packed: bool, num_heads: int, nope: int) -> None:
        self.num_heads, self.nope = num_heads, nope
        self.value = kv_b_weight.shape[0] // num_heads - nope
        self._given, self._packed = kv_b_weight, packed

    @functools.cached_property
    def weight(self) -> Tensor:
        """The weight [H * (N + V), L], for the context; unpacked once, where there is any."""
        return unpacked_linear(self._given) if self._packed else self._given

    def heads(self, kv: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Split heads; they share the rotated keys [C, R]."""
        k_nope, values = kv.unflatten(1, (self.num_heads, -1)).transpose(0, 1).split([self.nope, self.value], dim=-1)
        return torch.cat([k_nope, k_pe.expand(self.num_heads, -1, -1)], dim=-1), values


def _causal(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend the n tokens of a sequence among themselves: query and keys [H, n, N + R], values [H, n, V]."""
    width = values.shape[-1]
    if query.is_cpu and width < query.shape[-1]:  # torch's fused kernel there wants one size
        values = pad(values, (0, query.shape[-1] - width))
    attended = scaled_dot_product_attention(
        query.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), is_causal=True, scale=scale
    )
    return attended[0, ..., :width]


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, *, causal: bool) -> _Attended:
    """Attend in float32, some rows at a time: query [H, n, N + R], keys [H, C, N + R], values [H, C, V].

    With `causal`, row i sees the first i + 1 keys.
    """
    num_heads, num_new, _ = query.shape
    keys, values = keys.float(), values.float()
    rows = max(16, _SCORES // (num_heads * keys.shape[1]))
    parts = []
    for begin in range(0, num_new, rows):
        end = min(begin + rows, num_new)
        seen = end if causal else keys.shape[1]
        scores = torch.matmul(query[:, begin:end].float(), keys[:, :seen].transpose(1, 2)) * scale
        if causal:
            row = torch.arange(begin, end, device=query.device).unsqueeze(1)
            scores = scores.masked_fill(torch.arange(seen, device=query.device) > row, float("-inf"))
        parts.append(_Attended(torch.matmul(scores.softmax(-1), values[:, :seen]), scores.logsumexp(-1)))
    if len(parts) == 1:
        return parts[0]
    return _Attended(torch.cat([p.out for p in parts], dim=1), torch.cat([p.log_sum for p in parts], dim=1))


def _alike(lengths: list[int]) -> Iterator[list[int]]:
    """Yield groups of sequences to attend together, each from its longest to its shortest."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group:
            longest = lengths[group[0]]
            uneven = longest > _SHORT and lengths[index] * _UNEVEN < longest
            if uneven or (len(group) + 1) * longest > _GATHERED:
                yield group
                group = []
        group.append(index)
    if group:
        yield group


def _gather(latent_cache: Tensor, block_tables: Tensor, positions: Tensor, *, rank: int, like: Tensor) -> Tensor:
    """Copy the entries at `positions` [S, C] of sequences out of their blocks: [S, C, L + R], of the type of `like`.

    `like` is [..., L + R].
    """
    block_size = latent_cache.shape[1]
    slots = block_tables.gather(1, positions // block_size) * block_size + positions % block_size
    rope = like.shape[-1] - rank
    entries = mla_cache.take(latent_cache, slots.flatten(), rank=rank, rope=rope, dtype=like.dtype)
    return entries.view(*positions.shape, -1)
