"""Call the built attention kernel. What it can't do, or was not built for, plain torch does.

The library is opened with ctypes: one function that takes one struct. A call costs about 5 microseconds besides its
work, and gives up the interpreter's lock meanwhile.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import Final, NamedTuple, final

import torch
from torch import Tensor

from piecework.errors import OpError
from piecework.ops.attention import write_kv
from piecework.ops.attention_plain import Scores, attend_with
from piecework.ops.ir.values import flattened
from piecework.ops.sequences import Sequences

SOURCES: Final = Path(__file__).resolve().parent
DTYPES: Final = ("float32", "bfloat16", "float16")  # in the order of their numbers in attention.cpp

_ENTRY: Final = "piecework_attention_3"  # the number is that of the layout below
_CALL: Final = struct.Struct("11P19q2d")  # `Call` in call.h
_NUMBERS: Final = {getattr(torch, name): number for number, name in enumerate(DTYPES)}
_DONE, _UNSUPPORTED = 0, 1
_WRONG: Final = {
    2: "a slot outside of the cache",
    3: "sequence lengths that don't fit the new tokens or the block table",
    4: "a block outside of the cache",
    5: "no memory for partial results",
}


class NewKeys(NamedTuple):
    """New keys and values, both [T, K, D], and where they go, [T]."""

    key: Tensor
    value: Tensor
    slot_mapping: Tensor


@final
class CpuAttention:
    """`piecework::attention` over a library built from `SOURCES`.

    Args:
        library: the shared library. Raises OSError where it can't be opened, AttributeError where it is of another
            version.
    """

    def __init__(self, library: Path) -> None:
        self._run = getattr(ctypes.CDLL(str(library)), _ENTRY)
        self._run.argtypes = [ctypes.c_char_p]
        self._run.restype = ctypes.c_int32

    @flattened
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        sequences: Sequences,
        scores: Scores,
    ) -> Tensor:
        """Do what `attention_native` does. Raises OpError where slots, blocks or lengths don't fit the cache."""
        if _readable(query, key, value, kv_cache, slot_mapping):
            out = self._call(query, kv_cache, sequences, scores, NewKeys(key, value, slot_mapping))
            if out is not None:
                return out
        write_kv(key, value, kv_cache, slot_mapping)
        return attend_with(query, kv_cache, sequences, scores)

    @flattened
    def attend(self, query: Tensor, kv_cache: Tensor, sequences: Sequences, scores: Scores) -> Tensor:
        """Do the same over a cache that holds the new tokens already. Raises OpError as above."""
        out = self._call(query, kv_cache, sequences, scores, None)
        return attend_with(query, kv_cache, sequences, scores) if out is None else out

    def _call(
        self, query: Tensor, kv_cache: Tensor, sequences: Sequences, scores: Scores, new: NewKeys | None
    ) -> Tensor | None:
        """Return None, with nothing written, where the library can't do it."""
        if not _attendable(query, kv_cache, sequences, scores):
            return None
        bias = None if scores.key_bias is None else scores.key_bias.float().contiguous()
        block_tables, seq_lens, query_start, _ = sequences
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        _, num_blocks, block_size, num_kv_heads, _ = kv_cache.shape
        call = _CALL.pack(
            query.data_ptr(),
            0 if new is None else new.key.data_ptr(),
            0 if new is None else new.value.data_ptr(),
            kv_cache.data_ptr(),
            0 if new is None else new.slot_mapping.data_ptr(),
            block_tables.data_ptr(),
            seq_lens.data_ptr(),
            query_start.data_ptr(),
            0 if scores.sinks is None else scores.sinks.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            *query.stride()[:2],
            *((0, 0) if new is None else new.key.stride()[:2]),
            *((0, 0) if new is None else new.value.stride()[:2]),
            query.shape[0],
            seq_lens.shape[0],
            query.shape[1],
            num_kv_heads,
            query.shape[2],
            num_blocks,
            block_size,
            block_tables.shape[1],
            scores.sliding_window,
            scores.chunk,
            0 if bias is None else bias.shape[1],
            _NUMBERS[query.dtype],
            torch.get_num_threads(),
            scores.scale,
            scores.softcap,
        )
        code = self._run(call)
        if code == _DONE:
            return out
        if code == _UNSUPPORTED:
            return None
        raise OpError(
            asked=f"attention of {query.shape[0]} tokens in {seq_lens.shape[0]} sequences over {num_blocks} blocks",
            found=_WRONG.get(code, f"error {code}"),
            try_="check slot_mapping, block_tables, seq_lens and query_start",
        )


def _readable(query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> bool:
    """Whether the library can read the new keys and values."""
    shape = (query.shape[0], *kv_cache.shape[3:])
    return (
        key.shape == value.shape == shape
        and key.dtype == value.dtype == kv_cache.dtype
        and key.stride(2) == value.stride(2) == 1
        and slot_mapping.shape == shape[:1]
        and slot_mapping.dtype is torch.int64
        and slot_mapping.is_contiguous()
    )


def _attendable(query: Tensor, kv_cache: Tensor, sequences: Sequences, scores: Scores) -> bool:
    """Whether the library can read the rest: dense tensors on the CPU whose shapes go together."""
    block_tables, seq_lens, query_start, _ = sequences
    sinks, bias = scores.sinks, scores.key_bias
    num_seqs = seq_lens.shape[0]
    return (
        query.device.type == kv_cache.device.type == "cpu"
        and query.dtype is kv_cache.dtype
        and query.dtype in _NUMBERS
        and query.stride(2) == 1
        and query.shape[0] > 0
        and query.shape[2] == kv_cache.shape[4]
        and query.shape[1] % kv_cache.shape[3] == 0
        and kv_cache.is_contiguous()
        and block_tables.shape[0] == num_seqs
        and query_start.shape[0] == num_seqs + 1
        and block_tables.dtype is seq_lens.dtype is query_start.dtype is torch.int64
        and block_tables.is_contiguous()
        and seq_lens.is_contiguous()
        and query_start.is_contiguous()
        and (
            sinks is None or (sinks.shape == query.shape[1:2] and sinks.dtype is query.dtype and sinks.is_contiguous())
        )
        and (bias is None or (bias.is_cpu and bias.dim() == 2 and bias.shape[0] == query.shape[1]))
    )
