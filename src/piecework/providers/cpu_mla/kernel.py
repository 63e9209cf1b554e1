"""Call the built kernels of multi-head latent attention. What they can't do, or were not built for, plain torch does.

The library is opened with ctypes: functions that take one struct each. A call costs a few microseconds besides its
work, and gives up the interpreter's lock meanwhile.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor
from torch.nn.functional import linear

from piecework.errors import OpError
from piecework.ops import mla_plain
from piecework.providers.cpu_mla.rounds import LEAST_CHUNK, Chunk, padded, share_out

SOURCES: Final = Path(__file__).resolve().parent
DTYPES: Final = ("float32", "bfloat16", "float16")  # in the order of their numbers in mla.cpp

# Layouts of calls.h; an entry's number is that of its layout.
_PAGED: Final = "2P3q"
_WRITE: Final = ("piecework_mla_write_1", struct.Struct(_PAGED + "6P9qd"))
_DECODE: Final = ("piecework_mla_decode_1", struct.Struct(_PAGED + "4P10qd"))
_WRITE_DECODE: Final = ("piecework_mla_write_decode_1", struct.Struct(_PAGED + "6P9qd" + _PAGED + "4P10qdq"))
_GATHER: Final = ("piecework_mla_gather_1", struct.Struct(_PAGED + "3P6q"))
_PREFILL: Final = ("piecework_mla_prefill_1", struct.Struct("11P18qd"))

_NUMBERS: Final = {getattr(torch, name): number for number, name in enumerate(DTYPES)}
_DONE, _UNSUPPORTED = 0, 1
_WRONG: Final = {
    2: "a slot outside of the cache",
    3: "sequence lengths that don't fit the new tokens or the block table",
    4: "a block outside of the cache",
    5: "no memory for partial results",
}
_EXPANDED_BYTES: Final = 1 << 23  # of context's keys and values, expanded at once


@final
class CpuMla:
    """`mla_write`, `mla_decode`, `mla_write_decode` and `mla_prefill` over a library built from `SOURCES`.

    Args:
        library: the shared library. Raises OSError where it can't be opened, AttributeError where it is of another
            version.
    """

    def __init__(self, library: Path) -> None:
        opened = ctypes.CDLL(str(library))
        self._write, self._decode, self._write_decode, self._gather, self._prefill = (
            _entry(opened, name) for name, _ in (_WRITE, _DECODE, _WRITE_DECODE, _GATHER, _PREFILL)
        )

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
        call = _WRITE[1].pack(
            latent_cache.data_ptr(),
            0,
            *latent_cache.shape[:2],
            0,
            compressed.data_ptr(),
            norm_weight.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            slot_mapping.data_ptr(),
            entry.data_ptr(),
            compressed.stride(0),
            cos.stride(0),
            sin.stride(0),
            num_tokens,
            rank,
            width - rank,
            cos.dtype is torch.float32,
            _NUMBERS[compressed.dtype],
            torch.get_num_threads(),
            eps,
        )
        if _ran(self._write(call), asked=f"mla_write of {num_tokens} tokens"):
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
    ) -> Tensor:
        """Do what `mla_decode` does. Raises OpError where blocks or lengths don't fit the cache."""
        num_seqs, num_heads, rank = q_latent.shape
        rope = q_pe.shape[2]
        if not _decodes(q_latent, q_pe, latent_cache, block_tables, seq_lens):
            return mla_plain.decode(q_latent, q_pe, entry, latent_cache, block_tables, seq_lens, scale)
        out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
        if num_seqs == 0:
            return out
        call = _DECODE[1].pack(
            latent_cache.data_ptr(),
            block_tables.data_ptr(),
            *latent_cache.shape[:2],
            block_tables.shape[1],
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
            _NUMBERS[q_latent.dtype],
            torch.get_num_threads(),
            scale,
        )
        if _ran(self._decode(call), asked=f"mla_decode of {num_seqs} sequences over {latent_cache.shape[0]} blocks"):
            return out
        return mla_plain.decode(q_latent, q_pe, entry, latent_cache, block_tables, seq_lens, scale)

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
        cache, (num_blocks, block_size, _) = latent_cache.data_ptr(), latent_cache.shape
        dtype, num_threads = _NUMBERS[q_latent.dtype], torch.get_num_threads()
        token, head, _ = q_latent.stride()
        pe_token, pe_head, _ = q_pe.stride()
        call = _WRITE_DECODE[1].pack(
            *(cache, 0, num_blocks, block_size, 0, compressed.data_ptr(), norm_weight.data_ptr(), cos.data_ptr()),
            *(sin.data_ptr(), slot_mapping.data_ptr(), 0, compressed.stride(0), cos.stride(0), sin.stride(0)),
            *(num_tokens, rank, width - rank, cos.dtype is torch.float32, dtype, num_threads, eps),
            *(cache, block_tables.data_ptr(), num_blocks, block_size, block_tables.shape[1], q_latent.data_ptr()),
            *(q_pe.data_ptr(), seq_lens.data_ptr(), out.data_ptr(), token, head, pe_token, pe_head),
            *(num_tokens, num_heads, rank, width - rank, dtype, num_threads, scale, turned),
        )
        if _ran(self._write_decode(call), asked=f"mla_write_decode of {num_tokens} tokens over {num_blocks} blocks"):
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
    ) -> Tensor:
        """Do what `mla_prefill` does. Raises OpError where blocks or lengths don't fit cache and tokens."""
        num_tokens, num_heads, nope = q_nope.shape
        rank = kv_b_weight.shape[1]
        out = None
        if (
            _pageable(q_nope, latent_cache)
            and q_nope.dtype is q_pe.dtype is kv.dtype is entry.dtype is kv_b_weight.dtype
            and q_pe.shape[:2] == (num_tokens, num_heads)
            and kv.shape == (num_tokens - num_decode_tokens, kv_b_weight.shape[0])
            and entry.shape == (num_tokens, rank + q_pe.shape[2])
            and q_nope.stride(2) == q_pe.stride(2) == kv.stride(1) == entry.stride(1) == 1
            and latent_cache.shape[2] == entry.shape[1]
            and block_tables.shape[0] == seq_lens.shape[0] == query_start.shape[0] - 1
            and _dense_numbers(block_tables)
            and _dense_numbers(query_start)
            and (num_decode_tokens == 0 if decode_out is None else decode_out.shape[0] == num_decode_tokens)
            and (decode_out is None or (decode_out.dtype is q_nope.dtype and decode_out.stride(1) == 1))
        ):
            value = kv_b_weight.shape[0] // num_heads - nope
            batch = _Prompts(q_nope, q_pe, kv, entry, query_start, num_decode_tokens, scale, decode_out, value)
            old = _Cached(kv_b_weight, latent_cache, block_tables, seq_lens)
            out = self._prefill_rounds(batch, old)
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
        )

    def _prefill_rounds(self, batch: _Prompts, old: _Cached) -> Tensor | None:
        """Attend in rounds, each over some expanded context; None where the library can't do it."""
        starts, lengths = batch.query_start.tolist(), old.seq_lens.tolist()
        new = [end - begin for begin, end in itertools.pairwise(starts)]
        context = {
            seq: length - num
            for seq, (length, num) in enumerate(zip(lengths, new, strict=True))
            if seq >= batch.decodes
        }
        if any(num < 0 or new[seq] < 1 for seq, num in context.items()):
            _ran(3, asked=f"mla_prefill of {len(context)} sequences")
        row_bytes = old.kv_b_weight.shape[0] * old.kv_b_weight.element_size()
        rounds = share_out(context, new, most=max(LEAST_CHUNK, _EXPANDED_BYTES // row_bytes))
        num_heads = batch.q_nope.shape[1]
        out = batch.q_nope.new_empty(batch.q_nope.shape[0], num_heads * batch.value)
        state = None
        if any(chunk.paused for chunks in rounds for chunk in chunks):
            rows = max(p.state + padded(new[p.seq]) for chunks in rounds for p in chunks if p.state >= 0)
            state = torch.empty(rows * num_heads * (batch.value + 2))
        for number, chunks in enumerate(rounds):
            latents, keys = self._gathered(chunks, old)
            expanded = None if latents is None else linear(latents, old.kv_b_weight)
            if not self._round(batch, chunks, expanded, keys, state, out, first=number == 0):
                return None
        return out

    def _gathered(self, chunks: Sequence[Chunk], old: _Cached) -> tuple[Tensor | None, Tensor | None]:
        """Copy the chunks' cached entries: latents [C, L] and rotated keys [C, R]; None where they have none."""
        wanted = [chunk for chunk in chunks if chunk.count]
        if not wanted:
            return None, None
        count = sum(chunk.count for chunk in wanted)
        rank, cache = old.kv_b_weight.shape[1], old.latent_cache
        latents, keys = cache.new_empty(count, rank), cache.new_empty(count, cache.shape[2] - rank)
        slices = array("q", [n for chunk in wanted for n in (chunk.seq, chunk.begin, chunk.count)])
        call = _GATHER[1].pack(
            cache.data_ptr(),
            old.block_tables.data_ptr(),
            *cache.shape[:2],
            old.block_tables.shape[1],
            slices.buffer_info()[0],
            latents.data_ptr(),
            keys.data_ptr(),
            len(wanted),
            old.block_tables.shape[0],
            rank,
            keys.shape[1],
            cache.element_size(),
            torch.get_num_threads(),
        )
        _ran(self._gather(call), asked=f"{count} cached tokens of {len(wanted)} sequences")
        return latents, keys

    def _round(
        self,
        batch: _Prompts,
        chunks: Sequence[Chunk],
        expanded: Tensor | None,
        keys: Tensor | None,
        state: Tensor | None,
        out: Tensor,
        *,
        first: bool,
    ) -> bool:
        """Attend the chunks' new tokens over `expanded` [C, H * (N + V)]; whether the library could."""
        numbers, row = array("q"), 0
        for chunk in chunks:
            numbers.extend((chunk.seq, row, chunk.count, chunk.state, chunk.resumed, chunk.paused))
            row += chunk.count
        decoded = batch.decode_out if first else None
        new_keys = batch.entry[:, batch.entry.shape[1] - batch.q_pe.shape[2] :]
        call = _PREFILL[1].pack(
            batch.q_nope.data_ptr(),
            batch.q_pe.data_ptr(),
            batch.kv.data_ptr(),
            new_keys.data_ptr(),
            0 if expanded is None else expanded.data_ptr(),
            0 if keys is None else keys.data_ptr(),
            0 if decoded is None else decoded.data_ptr(),
            batch.query_start.data_ptr(),
            numbers.buffer_info()[0],
            0 if state is None else state.data_ptr(),
            out.data_ptr(),
            *batch.q_nope.stride()[:2],
            *batch.q_pe.stride()[:2],
            batch.kv.stride(0),
            new_keys.stride(0),
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
            _NUMBERS[batch.q_nope.dtype],
            torch.get_num_threads(),
            batch.scale,
        )
        return _ran(self._prefill(call), asked=f"mla_prefill of {batch.q_nope.shape[0]} tokens")


@dataclass(frozen=True)
class _Prompts:
    """The new tokens of a prefill; see `mla_prefill`."""

    q_nope: Tensor
    q_pe: Tensor
    kv: Tensor
    entry: Tensor
    query_start: Tensor
    decodes: int
    scale: float
    decode_out: Tensor | None
    value: int


@dataclass(frozen=True)
class _Cached:
    """What sequences have in the cache, and what expands it."""

    kv_b_weight: Tensor
    latent_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor


def _entry(library: ctypes.CDLL, name: str) -> Callable[[bytes], int]:
    function = getattr(library, name)
    function.argtypes = [ctypes.c_char_p]
    function.restype = ctypes.c_int32
    found: Callable[[bytes], int] = function
    return found


def _pageable(tensor: Tensor, latent_cache: Tensor) -> bool:
    """Whether the library knows the type, and can read and write the cache."""
    return (
        tensor.dtype in _NUMBERS
        and tensor.dtype is latent_cache.dtype
        and tensor.device.type == latent_cache.device.type == "cpu"
        and latent_cache.is_contiguous()
    )


def _writes(
    compressed: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor, latent_cache: Tensor, slot_mapping: Tensor
) -> bool:
    """Whether the library can norm, rotate and store these."""
    num_tokens, width = compressed.shape
    return (
        _pageable(compressed, latent_cache)
        and compressed.stride(1) == 1
        and norm_weight.dtype is compressed.dtype
        and norm_weight.is_contiguous()
        and cos.dtype is sin.dtype
        and (cos.dtype is torch.float32 or cos.dtype is compressed.dtype)
        and cos.shape == sin.shape == (num_tokens, (width - norm_weight.shape[0]) // 2)
        and cos.stride(1) == sin.stride(1) == 1
        and slot_mapping.shape == (num_tokens,)
        and _dense_numbers(slot_mapping)
        and latent_cache.shape[2] == width
    )


def _decodes(q_latent: Tensor, q_pe: Tensor, latent_cache: Tensor, block_tables: Tensor, seq_lens: Tensor) -> bool:
    """Whether the library can attend with these."""
    num_seqs, num_heads, rank = q_latent.shape
    return (
        _pageable(q_latent, latent_cache)
        and q_pe.dtype is q_latent.dtype
        and q_pe.shape[0] >= num_seqs
        and q_pe.shape[1] == num_heads
        and q_latent.stride(2) == q_pe.stride(2) == 1
        and latent_cache.shape[2] == rank + q_pe.shape[2]
        and block_tables.shape[0] >= num_seqs
        and seq_lens.shape[0] >= num_seqs
        and _dense_numbers(block_tables)
        and _dense_numbers(seq_lens)
    )


def _dense_numbers(tensor: Tensor) -> bool:
    return tensor.dtype is torch.int64 and tensor.is_contiguous()


def _ran(code: int, *, asked: str) -> bool:
    """Whether a call did it. Raises OpError where its numbers were wrong."""
    if code in (_DONE, _UNSUPPORTED):
        return code == _DONE
    raise OpError(
        asked=asked,
        found=_WRONG.get(code, f"error {code}"),
        try_="check slot_mapping, block_tables, seq_lens and query_start",
    )
