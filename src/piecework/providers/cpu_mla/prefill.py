"""Prefill by the library: rounds, in each of which some cached context is gathered, expanded and attended."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from piecework.ops.mla.core import Angles
from piecework.ops.mla.plain import Prompts
from piecework.ops.sequences import Sequences
from piecework.providers.cpu_mla.calls import GATHER, NUMBERS, PREFILL, WRONG_LENGTHS, angle_numbers, paged, ran
from piecework.providers.cpu_mla.rounds import LEAST_CHUNK, Chunk, padded, share_out

_EXPANDED_BYTES: Final = 1 << 23  # of context's keys and values, expanded at once


class Prefill(NamedTuple):
    """A call of `mla_prefill`, whose arguments these are."""

    prompts: Prompts
    kv_b_weight: Tensor
    packed: bool
    latent_cache: Tensor
    sequences: Sequences
    scale: float
    decode_out: Tensor | None
    angles: Angles

    @property
    def value(self) -> int:
        """The size of a head's values."""
        _, num_heads, nope = self.prompts.q_nope.shape
        return self.kv_b_weight.shape[0] // num_heads - nope


@dataclass(frozen=True)
class Rounds:
    """Prefill over the library's functions `gather` and `attend`."""

    gather: Callable[[bytes], int]
    attend: Callable[[bytes], int]

    def run(self, wanted: Prefill) -> Tensor | None:
        """Attend in rounds, each over some expanded context; None where the library can't do it."""
        q_nope, weight = wanted.prompts.q_nope, wanted.kv_b_weight
        num_tokens, num_heads, _ = q_nope.shape
        new, rounds = _shared_out(wanted)
        out = q_nope.new_empty(num_tokens, num_heads * wanted.value)
        state = None
        if any(chunk.paused for chunks in rounds for chunk in chunks):
            rows = max(p.state + padded(new[p.seq]) for chunks in rounds for p in chunks if p.state >= 0)
            state = torch.empty(rows * num_heads * (wanted.value + 2))
        for number, chunks in enumerate(rounds):
            expanded = keys = None
            if not wanted.packed and any(chunk.count for chunk in chunks):
                latents, keys = self._gathered(chunks, wanted)
                if latents is None:
                    return None
                expanded = linear(latents, weight)
            if not self._round(wanted, chunks, expanded, keys, state, out, first=number == 0):
                return None
        return out

    def _gathered(self, chunks: Sequence[Chunk], wanted: Prefill) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Copy the chunks' cached entries: latents [C, L] and rotated keys [C, R]; None where the library can't."""
        cached = [chunk for chunk in chunks if chunk.count]
        weight, block_tables = wanted.kv_b_weight, wanted.sequences.block_tables
        count, rank, rope = sum(chunk.count for chunk in cached), weight.shape[1], wanted.prompts.q_pe.shape[2]
        latents, keys = weight.new_empty(count, rank), weight.new_empty(count, rope)
        slices = array("q", [n for chunk in cached for n in (chunk.seq, chunk.begin, chunk.count)])
        call = GATHER[1].pack(
            *paged(wanted.latent_cache, block_tables),
            slices.buffer_info()[0],
            latents.data_ptr(),
            keys.data_ptr(),
            len(cached),
            block_tables.shape[0],
            rank,
            rope,
            NUMBERS[latents.dtype],
            torch.get_num_threads(),
        )
        done = ran(self.gather(call), asked=f"{count} cached tokens of {len(cached)} sequences")
        return (latents, keys) if done else (None, None)

    def _round(
        self,
        wanted: Prefill,
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
        numbers = _numbers(chunks)
        q_nope, q_pe, kv, entry = wanted.prompts
        block_tables, _, query_start, num_decode_tokens = wanted.sequences
        weight = wanted.kv_b_weight
        decoded = wanted.decode_out if first else None
        new_keys = entry[:, entry.shape[1] - q_pe.shape[2] :]
        call = PREFILL[1].pack(
            *paged(wanted.latent_cache, block_tables),
            *angle_numbers(wanted.angles),
            q_nope.data_ptr(),
            q_pe.data_ptr(),
            kv.data_ptr(),
            new_keys.data_ptr(),
            0 if expanded is None else expanded.data_ptr(),
            0 if keys is None else keys.data_ptr(),
            weight.data_ptr() if wanted.packed else 0,
            0 if decoded is None else decoded.data_ptr(),
            query_start.data_ptr(),
            numbers.buffer_info()[0],
            0 if state is None else state.data_ptr(),
            out.data_ptr(),
            *q_nope.stride()[:2],
            *q_pe.stride()[:2],
            kv.stride(0),
            new_keys.stride(0),
            kv.shape[1],
            kv.shape[1] // q_nope.shape[1],
            0 if decoded is None else decoded.stride(0),
            q_nope.shape[0],
            num_decode_tokens,
            query_start.shape[0] - 1,
            len(chunks),
            sum(chunk.count for chunk in chunks),
            q_nope.shape[1],
            q_nope.shape[2],
            q_pe.shape[2],
            wanted.value,
            weight.shape[1],
            NUMBERS[q_nope.dtype],
            torch.get_num_threads(),
            wanted.scale,
        )
        return ran(self.attend(call), asked=f"mla_prefill of {q_nope.shape[0]} tokens")


def _numbers(chunks: Sequence[Chunk]) -> array[int]:
    """Return the numbers of calls.h's `Prompt`, for each chunk."""
    numbers, row = array("q"), 0
    for chunk in chunks:
        numbers.extend((chunk.seq, row, chunk.count, chunk.begin, chunk.state, chunk.resumed, chunk.paused))
        row += chunk.count
    return numbers


def _shared_out(wanted: Prefill) -> tuple[list[int], list[list[Chunk]]]:
    """Return how many new tokens each sequence has, and the rounds."""
    _, seq_lens, query_start, num_decode_tokens = wanted.sequences
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    new = [end - begin for begin, end in itertools.pairwise(starts)]
    context = {
        seq: length - num
        for seq, (length, num) in enumerate(zip(lengths, new, strict=True))
        if seq >= num_decode_tokens
    }
    if any(num < 0 or new[seq] < 1 for seq, num in context.items()):
        ran(WRONG_LENGTHS, asked=f"mla_prefill of {len(context)} sequences")
    weight = wanted.kv_b_weight
    row_bytes = weight.shape[0] * weight.element_size()
    return new, share_out(context, new, most=max(LEAST_CHUNK, _EXPANDED_BYTES // row_bytes))
