"""Call the built kernels of multi-head latent attention. What they can't do or were not built for, plain torch does."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

from piecework.ops.ir.values import flattened
from piecework.ops.mla import plain as mla_plain
from piecework.ops.mla.core import ROTATED, Angles, NewLatents
from piecework.ops.mla.plain import Prompts
from piecework.ops.packed import can_be_packed
from piecework.ops.sequences import Sequences
from piecework.providers.cpu_mla.calls import (
    DECODE,
    GATHER,
    NUMBERS,
    PREFILL,
    WRITE,
    WRITE_DECODE,
    angle_numbers,
    dense_numbers,
    entry_point,
    pageable,
    paged,
    ran,
    rotatable,
)
from piecework.providers.cpu_mla.prefill import Prefill, Rounds

SOURCES: Final = Path(__file__).resolve().parent


@final
class CpuMla:
    """`mla_write`, `mla_decode`, `mla_write_decode` and `mla_prefill` over a library built from `SOURCES`.

    Args:
        library: the shared library. Raises OSError where it can't be opened, AttributeError where it is of another
            version.
    """

    def __init__(self, library: Path) -> None:
        opened = ctypes.CDLL(str(library))
        self._write, self._decode, self._write_decode, gather, attend = (
            entry_point(opened, name) for name, _ in (WRITE, DECODE, WRITE_DECODE, GATHER, PREFILL)
        )
        self._rounds = Rounds(gather, attend)

    @flattened
    def write(self, new: NewLatents) -> Tensor:
        """Do what `mla_write` does. Raises OpError where slots don't fit the cache."""
        if not _writes(new):
            return mla_plain.write(*new)
        compressed, rank = new.compressed, new.norm_weight.shape[0]
        num_tokens, width = compressed.shape
        entry = torch.empty_like(compressed, memory_format=torch.contiguous_format)
        call = WRITE[1].pack(
            *paged(new.latent_cache, None),
            *angle_numbers(Angles(new.cos, new.sin)),
            compressed.data_ptr(),
            new.norm_weight.data_ptr(),
            new.slot_mapping.data_ptr(),
            entry.data_ptr(),
            compressed.stride(0),
            num_tokens,
            rank,
            width - rank,
            NUMBERS[compressed.dtype],
            torch.get_num_threads(),
            new.eps,
        )
        if ran(self._write(call), asked=f"mla_write of {num_tokens} tokens"):
            return entry
        return mla_plain.write(*new)

    @flattened
    def decode(
        self,
        q_latent: Tensor,
        q_pe: Tensor,
        entry: Tensor | None,
        latent_cache: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        scale: float,
        angles: Angles = ROTATED,
    ) -> Tensor:
        """Do what `mla_decode` does. Raises OpError where blocks or lengths don't fit the cache."""
        num_seqs, num_heads, rank = q_latent.shape
        rope = q_pe.shape[2]
        given = (q_latent, q_pe, entry, latent_cache, block_tables, seq_lens, scale, *angles)
        first = Angles(*(None if x is None else x[:num_seqs] for x in angles))
        if not (_decodes(q_latent, q_pe, latent_cache, block_tables, seq_lens) and rotatable(first, q_pe[:num_seqs])):
            return mla_plain.decode(*given)
        out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
        if num_seqs == 0:
            return out
        call = DECODE[1].pack(
            *paged(latent_cache, block_tables),
            *angle_numbers(angles),
            q_latent.data_ptr(),
            q_pe.data_ptr(),
            seq_lens.data_ptr(),
            out.data_ptr(),
            *q_latent.stride()[:2],
            *q_pe.stride()[:2],
            num_seqs,
            num_heads,
            rank,
            rope,
            NUMBERS[q_latent.dtype],
            torch.get_num_threads(),
            scale,
        )
        if ran(self._decode(call), asked=f"mla_decode of {num_seqs} sequences over {latent_cache.shape[0]} blocks"):
            return out
        return mla_plain.decode(*given)

    @flattened
    def write_decode(
        self,
        q_latent: Tensor,
        q_pe: Tensor,
        turned: bool,  # noqa: FBT001  an operator's arguments come in order
        new: NewLatents,
        block_tables: Tensor,
        seq_lens: Tensor,
        scale: float,
    ) -> Tensor:
        """Do what `mla_write_decode` does. Raises OpError where slots, blocks or lengths don't fit the cache."""
        num_tokens, num_heads, rank = q_latent.shape
        compressed, width = new.compressed, new.compressed.shape[1]
        given = (q_latent, q_pe, turned, *new, block_tables, seq_lens, scale)
        if not (
            num_tokens == compressed.shape[0]
            and rank == new.norm_weight.shape[0]
            and q_latent.dtype is compressed.dtype
            and _writes(new)
            and _decodes(q_latent, q_pe, new.latent_cache, block_tables, seq_lens)
        ):
            return mla_plain.write_decode(*given)
        out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
        if num_tokens == 0:
            return out
        dtype, num_threads = NUMBERS[q_latent.dtype], torch.get_num_threads()
        token, head, _ = q_latent.stride()
        pe_token, pe_head, _ = q_pe.stride()
        angles = angle_numbers(Angles(new.cos, new.sin))
        call = WRITE_DECODE[1].pack(
            *paged(new.latent_cache, None),
            *angles,
            *(compressed.data_ptr(), new.norm_weight.data_ptr(), new.slot_mapping.data_ptr(), 0),
            *(compressed.stride(0), num_tokens, rank, width - rank, dtype, num_threads, new.eps),
            *paged(new.latent_cache, block_tables),
            *(angle_numbers(ROTATED) if turned else angles),
            *(q_latent.data_ptr(), q_pe.data_ptr(), seq_lens.data_ptr(), out.data_ptr(), token, head),
            *(pe_token, pe_head, num_tokens, num_heads, rank, width - rank, dtype, num_threads, scale),
        )
        asked = f"mla_write_decode of {num_tokens} tokens over {new.latent_cache.shape[0]} blocks"
        if ran(self._write_decode(call), asked=asked):
            return out
        return mla_plain.write_decode(*given)

    @flattened
    def prefill(
        self,
        prompts: Prompts,
        kv_b_weight: Tensor,
        latent_cache: Tensor,
        sequences: Sequences,
        scale: float,
        decode_out: Tensor | None = None,
        angles: Angles = ROTATED,
        packed: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        """Do what `mla_prefill` does. Raises OpError where blocks or lengths don't fit cache and tokens."""
        wanted = Prefill(prompts, kv_b_weight, packed, latent_cache, sequences, scale, decode_out, angles)
        out = self._rounds.run(wanted) if _prefills(wanted) else None
        if out is not None:
            return out
        rest = (scale, decode_out, *angles, packed)
        return mla_plain.prefill(*prompts, kv_b_weight, latent_cache, *sequences, *rest)


def _writes(new: NewLatents) -> bool:
    """Whether the library can norm, rotate and store these."""
    compressed, norm_weight = new.compressed, new.norm_weight
    rank = norm_weight.shape[0]
    num_tokens, width = compressed.shape
    return (
        pageable(compressed, new.latent_cache, rank=rank, rope=width - rank)
        and compressed.stride(1) == 1
        and norm_weight.dtype is compressed.dtype
        and norm_weight.is_contiguous()
        and rotatable(Angles(new.cos, new.sin), compressed[:, rank:])
        and new.slot_mapping.shape == (num_tokens,)
        and dense_numbers(new.slot_mapping)
    )


def _prefills(wanted: Prefill) -> bool:
    """Whether the library can attend with these."""
    q_nope, q_pe, kv, entry = wanted.prompts
    block_tables, seq_lens, query_start, num_decode_tokens = wanted.sequences
    weight, decode_out = wanted.kv_b_weight, wanted.decode_out
    num_tokens, num_heads, _ = q_nope.shape
    rank, rope = weight.shape[1], q_pe.shape[2]
    return (
        pageable(q_nope, wanted.latent_cache, rank=rank, rope=rope)
        and q_nope.dtype is q_pe.dtype is kv.dtype is entry.dtype is weight.dtype
        and q_pe.shape[:2] == (num_tokens, num_heads)
        and kv.shape == (num_tokens - num_decode_tokens, weight.shape[0])
        and entry.shape == (num_tokens, rank + rope)
        and q_nope.stride(2) == q_pe.stride(2) == kv.stride(1) == entry.stride(1) == 1
        and rotatable(wanted.angles, q_pe)
        and (not wanted.packed or _expands(weight, num_heads))
        and block_tables.shape[0] == seq_lens.shape[0] == query_start.shape[0] - 1
        and dense_numbers(block_tables)
        and dense_numbers(query_start)
        and (num_decode_tokens == 0 if decode_out is None else decode_out.shape[0] == num_decode_tokens)
        and (decode_out is None or (decode_out.dtype is q_nope.dtype and decode_out.stride(1) == 1))
    )


def _expands(packed: Tensor, num_heads: int) -> bool:
    """Whether the library can expand context by this packed weight."""
    rows, rank = packed.shape
    dtype = str(packed.dtype).removeprefix("torch.")
    return rows % num_heads == 0 and packed.is_contiguous() and can_be_packed(rank, rows, dtype)


def _decodes(q_latent: Tensor, q_pe: Tensor, latent_cache: Tensor, block_tables: Tensor, seq_lens: Tensor) -> bool:
    """Whether the library can attend with these."""
    num_seqs, num_heads, rank = q_latent.shape
    return (
        pageable(q_latent, latent_cache, rank=rank, rope=q_pe.shape[2])
        and q_pe.dtype is q_latent.dtype
        and q_pe.shape[0] >= num_seqs
        and q_pe.shape[1] == num_heads
        and q_latent.stride(2) == q_pe.stride(2) == 1
        and block_tables.shape[0] >= num_seqs
        and seq_lens.shape[0] >= num_seqs
        and dense_numbers(block_tables)
        and dense_numbers(seq_lens)
    )
