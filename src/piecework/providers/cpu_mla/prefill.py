"""Prefill by the library: rounds, in each of which some cached context is gathered, expanded and attended."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from piecework.providers.cpu_mla.calls import GATHER, NUMBERS, PREFILL, WRONG_LENGTHS, angles, paged, ran
from piecework.providers.cpu_mla.rounds import LEAST_CHUNK, Chunk, padded, share_out

_EXPANDED_BYTES: Final = 1 << 23  # of context's keys and values, expanded at once


@dataclass(frozen=True)
class Prompts:
    """The new tokens of a prefill; see `mla_prefill`."""

    q_nope: Tensor
    q_pe: Tensor
    kv: Tensor
    entry: Tensor
    query_start: Tensor
    decodes: int
    scale: float
    decode_out: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    value: int


@dataclass(frozen=True)
class Cached:
    """What sequences have in the cache, and what expands it; `packed` is as in `mla_prefill`."""

    kv_b_weight: Tensor
    packed: bool
    latent_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor


@dataclass(frozen=True)
class Rounds:
    """Prefill over the library's functions `gather` and `attend`."""

    gather: Callable[[bytes], int]
    attend: Callable[[bytes], int]

    def run(self, batch: Prompts, old: Cached) -> Tensor | None:
        """Attend in rounds, each over some expanded context; None where the library can't do it."""
        starts, lengths = batch.query_start.tolist(), old.seq_lens.tolist()
        new = [end - begin for begin, end in itertools.pairwise(starts)]
        context = {
            seq: length - num
            for seq, (length, num) in enumerate(zip(lengths, new, strict=True))
            if seq >= batch.decodes
        }
        if any(num < 0 or new[seq] < 1 for seq, num in context.items()):
            ran(WRONG_LENGTHS, asked=f"mla_prefill of {len(context)} sequences")
        row_bytes = old.kv_b_weight.shape[0] * old.kv_b_weight.element_size()
        rounds = share_out(context, new, most=max(LEAST_CHUNK, _EXPANDED_BYTES // row_bytes))
        num_heads = batch.q_nope.shape[1]
        out = batch.q_nope.new_empty(batch.q_nope.shape[0], num_heads * batch.value)
        state = None
        if any(chunk.paused for chunks in rounds for chunk in chunks):
            rows = max(p.state + padded(new[p.seq]) for chunks in rounds for p in chunks if p.state >= 0)
            state = torch.empty(rows * num_heads * (batch.value + 2))
        for number, chunks in enumerate(rounds):
            expanded = keys = None
            if not old.packed and any(chunk.count for chunk in chunks):
                latents, keys = self._gathered(chunks, old, rope=batch.q_pe.shape[2])
                if latents is None:
                    return None
                expanded = linear(latents, old.kv_b_weight)
            if not self._round(batch, old, chunks, expanded, keys, state, out, first=number == 0):
                return None
        return out

    def _gathered(
        self, chunks: Sequence[Chunk], old: Cached, *, rope: int
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Copy the chunks' cached entries: latents [C, L] and rotated keys [C, R]; None where the library can't."""
        wanted = [chunk for chunk in chunks if chunk.count]
        count, rank = sum(chunk.count for chunk in wanted), old.kv_b_weight.shape[1]
        latents, keys = old.kv_b_weight.new_empty(count, rank), old.kv_b_weight.new_empty(count, rope)
        slices = array("q", [n for chunk in wanted for n in (chunk.seq, chunk.begin, chunk.count)])
        call = GATHER[1].pack(
            *paged(old.latent_cache, old.block_tables),
            slices.buffer_info()[0],
            latents.data_ptr(),
            keys.data_ptr(),
            len(wanted),
            old.block_tables.shape[0],
            rank,
            rope,
            NUMBERS[latents.dtype],
            torch.get_num_threads(),
        )
        done = ran(self.gather(call), asked=f"{count} cached tokens of {len(wanted)} sequences")
        return (latents, keys) if done else (None, None)

    def _round(
        self,
        batch: Prompts,
        old: Cached,
        chunks: Sequence[Chunk],
        expanded: Tensor | None,
        keys: Tensor | None,
        state: Tensor | None,
        out: Tensor,
        *,
        first: bool,
    ) -> bool:
        """Attend the chunks' new tokens over `expanded` [C, H * (N + V)], which the library makes where that is None.

        Returns whether the library could.
        """
        numbers, row = array("q"), 0
        for chunk in chunks:
            numbers.extend((chunk.seq, row, chunk.count, chunk.begin, chunk.state, chunk.resumed, chunk.paused))
            row += chunk.count
        decoded = batch.decode_out if first else None
        new_keys = batch.entry[:, batch.entry.shape[1] - batch.q_pe.shape[2] :]
        call = PREFILL[1].pack(
            *paged(old.latent_cache, old.block_tables),
            *angles(batch.cos, batch.sin),
            batch.q_nope.data_ptr(),
            batch.q_pe.data_ptr(),
            batch.kv.data_ptr(),
            new_keys.data_ptr(),
            0 if expanded is None else expanded.data_ptr(),
            0 if keys is None else keys.data_ptr(),
            old.kv_b_weight.data_ptr() if old.packed else 0,
            0 if decoded is None else decoded.data_ptr(),
            batch.query_start.data_ptr(),
            numbers.buffer_info()[0],
            0 if state is None else state.data_ptr(),
            out.data_ptr(),
            *batch.q_nope.stride()[:2],
            *batch.q_pe.stride()[:2],
            batch.kv.stride(0),
            new_keys.stride(0),
            batch.kv.shape[1],
            batch.kv.shape[1] // batch.q_nope.shape[1],
            0 if decoded is None else decoded.stride(0),
            batch.q_nope.shape[0],
            batch.decodes,
            batch.query_start.shape[0] - 1,
            len(chunks),
            row,
            batch.q_nope.shape[1],
            batch.q_nope.shape[2],
            batch.q_pe.shape[2],
            batch.value,
            old.kv_b_weight.shape[1],
            NUMBERS[batch.q_nope.dtype],
            torch.get_num_threads(),
            batch.scale,
        )
        return ran(self.attend(call), asked=f"mla_prefill of {batch.q_nope.shape[0]} tokens")
