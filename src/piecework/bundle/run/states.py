"""Memory for states (KV caches): zeros that take no memory, and no time, until they are used."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from math import prod
from typing import Final

import torch

_LEAST_MAPPED_BYTES: Final = 1 << 20


def zeros(shape: Sequence[int], *, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return a contiguous tensor of zeros.

    A large one on the host is memory mapped from the system, whose pages are zeros and come when they are first used:
    a KV cache of gigabytes would otherwise take seconds to write, and all of its memory at once.

    Raises RuntimeError or OSError where memory does not suffice.
    """
    num_bytes = prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or num_bytes < _LEAST_MAPPED_BYTES:
        return torch.zeros(*shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OverflowError as error:
        raise OSError(f"{num_bytes} bytes are more than can be addressed") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):  # a cache is read in all places, which is many pages of 4 KiB
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)
