"""What all of Triton's implementations ask of their arguments."""

from __future__ import annotations

from typing import Final

import torch
import triton
from torch import Tensor

NAME: Final = "triton"
LONGEST: Final = 65536  # elements of a row, which one program holds at once
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def rows_supported(*tensors: Tensor | None) -> bool | str:
    """Whether tensors are on a GPU (or anywhere, under the interpreter), of a float type, and contiguous."""
    first = tensors[0]
    assert first is not None
    if not first.is_cuda and not interpreted():
        return f"the call is on {first.device.type}, Triton's kernels run on a GPU"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            return f"a tensor is {str(tensor.dtype).removeprefix('torch.')}"
        if not tensor.is_contiguous():
            return "a tensor is not contiguous"
    if first.shape[-1] > LONGEST:
        return f"rows of {first.shape[-1]} elements, more than {LONGEST}"
    return True


def interpreted() -> bool:
    """Whether Triton interprets kernels instead of compiling them."""
    return bool(triton.knobs.runtime.interpret)


def block_of(width: int) -> int:
    """Return how many elements a program holds for a row of `width`: the next power of two."""
    return int(triton.next_power_of_2(width))


def num_rows(x: Tensor) -> int:
    """Return the number of rows of a tensor: the product of all axes but the last."""
    return x.numel() // x.shape[-1] if x.numel() else 0
