"""Call the built kernels of multi-head latent attention. What they can't do or were not built for, plain torch does."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

from piecework.ops.mla import plain as mla_plain
from piecework.ops.packed import can_be_packed
from piecework.providers.cpu_mla.calls import (
    DECODE,
    GATHER,
    NUMBERS,
    PREFILL,
    WRITE,
    WRITE_DECODE,
    angles,
    dense_numbers,
    entry_point,
    pageable,
    paged,
    ran,
    rotatable,
)
from piecework.providers.cpu_mla.prefill import Cached, Prompts, Rounds

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

    def write(
        self,
        compressed: Tensor,
        norm_weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        latent_cache: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """Do what `mla_write` does. Raises OpError where slots don't fit the cache."""
        num_tokens, width = compressed.shape
        rank = norm_weight.shape[0]
        if not _writes(compressed, norm_weight, cos, sin, latent_cache, slot_mapping):
            return mla_plain.write(compressed, norm_weight, eps, cos, sin, latent_cache, slot_mapping)
        entry = torch.empty_like(compressed, memory_format=torch.contiguous_format)
        call = WRITE[1].pack(
            *paged(latent_cache, None),
            *angles(cos, sin),
            compressed.data_ptr(),
            norm_weight.data_ptr(),
            slot_mapping.data_ptr(),
            entry.data_ptr(),
            compressed.stride(0),
            num_tokens,
            rank,
            width - rank,
            NUMBERS[compressed.dtype],
            torch.get_num_threads(),
            eps,
        )
        if ran(self._write(call), asked=f"mla_write of {num_tokens} tokens"):
            return entry
        return mla_plain.write(compressed, norm_weight, eps, cos, sin, latent_cache, slot_mapping)

    def decode(
        self,
        q_latent: Tensor,
        q_pe: Tensor,
        entry: Tensor | None,
        latent_cache: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        scale: float,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> Tensor:
        """Do what `mla_decode` does. Raises OpError where blocks or lengths don't fit the cache."""
        num_seqs, num_heads, rank = q_latent.shape
        rope = q_pe.shape[2]
        if not (
            _decodes(q_latent, q_pe, latent_cache, block_tables, seq_lens)
            and rotatable(_first(cos, num_seqs), _first(sin, num_seqs), q_pe[:num_seqs])
        ):
            return mla_plain.decode(q_latent, q_pe, entry, latent_cache, block_tables, seq_lens, scale, cos, sin)
        out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
        if num_seqs == 0:
            return out
        call = DECODE[1].pack(
            *paged(latent_cache, block_tables),
            *angles(cos, sin),
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
        return mla_plain.decode(q_latent, q_pe, entry, latent_cache, block_tables, seq_lens, scale, cos, sin)

    def write_decode(
        self,
        q_latent: Tensor,
        q_pe: Tensor,
        turned: bool,  # noqa: FBT001  an operator's arguments come in order
        compressed: Tensor,
        norm_weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        latent_cache: Tensor,
        slot_mapping: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        scale: float,
    ) -> Tensor:
        """Do what `mla_write_decode` does. Raises OpError where slots, blocks or lengths don't fit the cache."""
        num_tokens, num_heads, rank = q_latent.shape
        width = compressed.shape[1]
        written = (compressed, norm_weight, eps, cos, sin, latent_cache, slot_mapping)
        if not (
            num_tokens == compressed.shape[0]
            and rank == norm_weight.shape[0]
            and q_latent.dtype is compressed.dtype
            and _writes(compressed, norm_weight, cos, sin, latent_cache, slot_mapping)
            and _decodes(q_latent, q_pe, latent_cache, block_tables, seq_lens)
        ):
            return mla_plain.write_decode(q_latent, q_pe, turned, *written, block_tables, seq_lens, scale)
        out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
        if num_tokens == 0:
            return out
        dtype, num_threads = NUMBERS[q_latent.dtype], torch.get_num_threads()
        token, head, _ = q_latent.stride()
        pe_token, pe_head, _ = q_pe.stride()
        call = WRITE_DECODE[1].pack(
            *paged(latent_cache, None),
            *angles(cos, sin),
            *(compressed.data_ptr(), norm_weight.data_ptr(), slot_mapping.data_ptr(), 0),
            *(compressed.stride(0), num_tokens, rank, width - rank, dtype, num_threads, eps),
            *paged(latent_cache, block_tables),
            *(angles(None, None) if turned else angles(cos, sin)),
            *(q_latent.data_ptr(), q_pe.data_ptr(), seq_lens.data_ptr(), out.data_ptr(), token, head),
            *(pe_token, pe_head, num_tokens, num_heads, rank, width - rank, dtype, num_threads, scale),
        )
        asked = f"mla_write_decode of {num_tokens} tokens over {latent_cache.shape[0]} blocks"
        if ran(self._write_decode(call), asked=asked):
            return out
        return mla_plain.write_decode(q_latent, q_pe, turned, *written, block_tables, seq_lens, scale)

    def prefill(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        kv: Tensor,
        entry: Tensor,
        kv_b_weight: Tensor,
        latent_cache: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        query_start: Tensor,
        num_decode_tokens: int,
        scale: float,
        decode_out: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        packed: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        """Do what `mla_prefill` does. Raises OpError where blocks or lengths don't fit cache and tokens."""
        num_tokens, num_heads, nope = q_nope.shape
        rank = kv_b_weight.shape[1]
        out = None
        if (
            pageable(q_nope, latent_cache, rank=rank, rope=q_pe.shape[2])
            and q_nope.dtype is q_pe.dtype is kv.dtype is entry.dtype is kv_b_weight.dtype
            and q_pe.shape[:2] == (num_tokens, num_heads)
            and kv.shape == (num_tokens - num_decode_tokens, kv_b_weight.shape[0])
            and entry.shape == (num_tokens, rank + q_pe.shape[2])
            and q_nope.stride(2) == q_pe.stride(2) == kv.stride(1) == entry.stride(1) == 1
            and rotatable(cos, sin, q_pe)
            and (not packed or _expands(kv_b_weight, num_heads))
            and block_tables.shape[0] == seq_lens.shape[0] == query_start.shape[0] - 1
            and dense_numbers(block_tables)
            and dense_numbers(query_start)
            and (num_decode_tokens == 0 if decode_out is None else decode_out.shape[0] == num_decode_tokens)
            and (decode_out is None or (decode_out.dtype is q_nope.dtype and decode_out.stride(1) == 1))
        ):
            value = kv_b_weight.shape[0] // num_heads - nope
            batch = Prompts(q_nope, q_pe, kv, entry, query_start, num_decode_tokens, scale, decode_out, cos, sin, value)
            old = Cached(kv_b_weight, packed, latent_cache, block_tables, seq_lens)
            out = self._rounds.run(batch, old)
        if out is not None:
            return out
        return mla_plain.prefill(
            q_nope,
            q_pe,
            kv,
            entry,
            kv_b_weight,
            latent_cache,
            block_tables,
            seq_lens,
            query_start,
            num_decode_tokens,
            scale,
            decode_out,
            cos,
            sin,
            packed,
        )


def _writes(
    compressed: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor, latent_cache: Tensor, slot_mapping: Tensor
) -> bool:
    """Whether the library can norm, rotate and store these."""
    num_tokens, width = compressed.shape
    return (
        pageable(compressed, latent_cache, rank=norm_weight.shape[0], rope=width - norm_weight.shape[0])
        and compressed.stride(1) == 1
        and norm_weight.dtype is compressed.dtype
        and norm_weight.is_contiguous()
        and rotatable(cos, sin, compressed[:, norm_weight.shape[0] :])
        and slot_mapping.shape == (num_tokens,)
        and dense_numbers(slot_mapping)
    )


def _first(x: Tensor | None, count: int) -> Tensor | None:
    return None if x is None else x[:count]


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
