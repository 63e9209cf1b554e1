"""The layout in which code of ours reads matrices (providers/cpu_common/products.h): blocks of columns, each in order.

Shape suffixes: H heads, K rows of a matrix, W its columns.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BLOCK_COLUMNS: Final = 32
PACKED_DTYPES: Final = ("float32", "bfloat16", "float16")


def can_be_packed(rows: int, columns: int, dtype: str) -> bool:
    """Whether matrices of so many rows and columns, of `dtype`, can be brought into that layout."""
    return dtype in PACKED_DTYPES and rows % 2 == 0 and columns % BLOCK_COLUMNS == 0


def packed_matrices(matrices: Tensor) -> Tensor:
    """Return matrices [H, K, W] as they are read, in a tensor of the same shape.

    A head's columns come in blocks of `BLOCK_COLUMNS`. Within a block, rows follow each other; those of bfloat16 come
    in pairs, as do the elements of both rows in one column.
    """
    heads, rows, width = matrices.shape
    if matrices.dtype is torch.bfloat16:
        blocks = matrices.reshape(heads, rows // 2, 2, width // BLOCK_COLUMNS, BLOCK_COLUMNS).permute(0, 3, 1, 4, 2)
    else:
        blocks = matrices.reshape(heads, rows, width // BLOCK_COLUMNS, BLOCK_COLUMNS).permute(0, 2, 1, 3)
    return blocks.contiguous().view(heads, rows, width)


def unpacked_matrices(packed: Tensor) -> Tensor:
    """Return what `packed_matrices` was given."""
    heads, rows, width = packed.shape
    if packed.dtype is torch.bfloat16:
        blocks = packed.reshape(heads, width // BLOCK_COLUMNS, rows // 2, BLOCK_COLUMNS, 2)
        rows_first = blocks.permute(0, 2, 4, 1, 3)
    else:
        blocks = packed.reshape(heads, width // BLOCK_COLUMNS, rows, BLOCK_COLUMNS)
        rows_first = blocks.permute(0, 2, 1, 3)
    return rows_first.reshape(heads, rows, width)


def packed_linear(weight: Tensor) -> Tensor:
    """Return a linear layer's weight [out, in] as it is read, in a tensor of the same shape: a matrix [in, out].

    Words of 32 bits move, with the one to eight numbers of a row that each holds; numbers of float16 move one by one.
    Scales and offsets of quantized weights (ops/linear_quantized.py), which are [out, groups], move in the same way.
    """
    words = weight.contiguous().view(_word(weight.dtype))
    blocks = words.reshape(words.shape[0] // BLOCK_COLUMNS, BLOCK_COLUMNS, words.shape[1]).transpose(1, 2)
    return blocks.contiguous().view(weight.dtype).view(weight.shape)


def unpacked_linear(packed: Tensor) -> Tensor:
    """Return what `packed_linear` was given."""
    words = packed.view(_word(packed.dtype))
    blocks = words.reshape(words.shape[0] // BLOCK_COLUMNS, words.shape[1], BLOCK_COLUMNS).transpose(1, 2)
    return blocks.contiguous().view(packed.dtype).view(packed.shape)


def _word(dtype: torch.dtype) -> torch.dtype:
    return torch.int16 if dtype is torch.float16 else torch.int32
