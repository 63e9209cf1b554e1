"""How the library's functions are called: layouts of what they are given, numbers for types, and errors.

The library is opened with ctypes: functions that take one struct each. A call costs a few microseconds besides its
work, and gives up the interpreter's lock meanwhile.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from piecework.errors import OpError
from piecework.ops.mla.cache import entry_width
from piecework.ops.mla.core import Angles

DTYPES: Final = ("float32", "bfloat16", "float16")  # in the order of their numbers in mla.cpp
NUMBERS: Final = {getattr(torch, name): number for number, name in enumerate(DTYPES)}

# Layouts of calls.h; an entry's number is that of its layout.
_PAGED: Final = "2P4q"
_ANGLES: Final = "2P3q"
_WRITE: Final = _PAGED + _ANGLES + "4P6qd"
_DECODE: Final = _PAGED + _ANGLES + "4P10qd"
WRITE: Final = ("piecework_mla_write_3", struct.Struct(_WRITE))
DECODE: Final = ("piecework_mla_decode_3", struct.Struct(_DECODE))
WRITE_DECODE: Final = ("piecework_mla_write_decode_3", struct.Struct(_WRITE + _DECODE))
GATHER: Final = ("piecework_mla_gather_2", struct.Struct(_PAGED + "3P6q"))
PREFILL: Final = ("piecework_mla_prefill_3", struct.Struct(_PAGED + _ANGLES + "12P21qd"))

_DONE, _UNSUPPORTED = 0, 1
WRONG_LENGTHS: Final = 3
_WRONG: Final = {
    2: "a slot outside of the cache",
    WRONG_LENGTHS: "sequence lengths that don't fit the new tokens or the block table",
    4: "a block outside of the cache",
    5: "no memory for partial results, or for keys and values of the context",
}


def entry_point(library: ctypes.CDLL, name: str) -> Callable[[bytes], int]:
    """Return a function of the library. Raises AttributeError where it has none of that name."""
    function = getattr(library, name)
    function.argtypes = [ctypes.c_char_p]
    function.restype = ctypes.c_int32
    found: Callable[[bytes], int] = function
    return found


def ran(code: int, *, asked: str) -> bool:
    """Whether a call did it. Raises OpError where its numbers were wrong."""
    if code in (_DONE, _UNSUPPORTED):
        return code == _DONE
    raise OpError(
        asked=asked,
        found=_WRONG.get(code, f"error {code}"),
        try_="check slot_mapping, block_tables, seq_lens and query_start",
    )


def pageable(tensor: Tensor, latent_cache: Tensor, *, rank: int, rope: int) -> bool:
    """Whether the library knows the type, and can read and write the cache, whose entries are such, maybe in fp8."""
    return (
        tensor.dtype in NUMBERS
        and latent_cache.dtype in (tensor.dtype, torch.uint8)
        and tensor.device.type == latent_cache.device.type == "cpu"
        and latent_cache.is_contiguous()
        and latent_cache.shape[2] == entry_width(latent_cache.dtype, tensor.dtype, rank=rank, rope=rope)
    )


def paged(latent_cache: Tensor, block_tables: Tensor | None) -> tuple[int, ...]:
    """Return the numbers of calls.h's `Paged`."""
    tables, width = (0, 0) if block_tables is None else (block_tables.data_ptr(), block_tables.shape[1])
    return (latent_cache.data_ptr(), tables, *latent_cache.shape[:2], width, latent_cache.dtype is torch.uint8)


def rotatable(angles: Angles, x: Tensor) -> bool:
    """Whether the library can rotate the tokens of x [T, ..., R] by these angles; without any, they are rotated."""
    cos, sin = angles
    if cos is None or sin is None:
        return cos is sin
    return (
        cos.dtype is sin.dtype
        and (cos.dtype is torch.float32 or cos.dtype is x.dtype)
        and cos.shape == sin.shape == (x.shape[0], x.shape[-1] // 2)
        and cos.stride(1) == sin.stride(1) == 1
    )


def angle_numbers(angles: Angles) -> tuple[int, ...]:
    """Return the numbers of calls.h's `Angles`."""
    cos, sin = angles
    if cos is None or sin is None:
        return (0, 0, 0, 0, 0)
    return (cos.data_ptr(), sin.data_ptr(), cos.stride(0), sin.stride(0), cos.dtype is torch.float32)


def dense_numbers(tensor: Tensor) -> bool:
    """Whether the library can read a tensor of numbers."""
    return tensor.dtype is torch.int64 and tensor.is_contiguous()
