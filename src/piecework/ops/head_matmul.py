"""`piecework::head_matmul`: every head's tokens times the head's own matrix, one operator in captured graphs.

Latent attention's absorbed projections are that. It is a batched matrix product, with tokens before heads on both sides
as the layers around it have them, so that nothing is turned about in memory. Kept whole, a compile may have it done by
code of its own, on matrices that were packed at load (passes/native_matmul.py); anywhere else it is torch's `bmm`.

Shape suffixes: T tokens, H heads, K rows of a head's matrix, W its columns.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

HEAD_MATMUL_OP: Final = "piecework::head_matmul"
BLOCK_COLUMNS: Final = 32
_library: Final = torch.library.Library("piecework", "FRAGMENT")


def head_matmul_native(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [T, H, K] times weight [H, K, W], head by head: [T, H, W], contiguous, in x's dtype."""
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1).contiguous()


def head_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Do what `head_matmul_native` does, as one operator."""
    made: Tensor = torch.ops.piecework.head_matmul.default(x, weight)
    return made


def packed_matrices(weight: Tensor) -> Tensor:
    """Return matrices [H, K, W] as providers/cpu_pieces reads them, in a tensor of the same shape.

    A head's columns come in blocks of `BLOCK_COLUMNS`. Within a block, rows follow each other; those of bfloat16 come
    in pairs, as do the elements of both rows in one column.

    Args:
        weight: float32 or bfloat16; W is a multiple of `BLOCK_COLUMNS`, and K of 2.
    """
    heads, rows, width = weight.shape
    if weight.dtype is torch.bfloat16:
        blocks = weight.reshape(heads, rows // 2, 2, width // BLOCK_COLUMNS, BLOCK_COLUMNS).permute(0, 3, 1, 4, 2)
    else:
        blocks = weight.reshape(heads, rows, width // BLOCK_COLUMNS, BLOCK_COLUMNS).permute(0, 2, 1, 3)
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


def _packed_product(x: Tensor, packed: Tensor) -> Tensor:
    return head_matmul_native(x, unpacked_matrices(packed))


def _head_matmul_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[2]))


# Those that are composite come apart when they are traced again; `head_matmul_cpu` is called by a name in C.
if not hasattr(torch.ops.piecework, "head_matmul"):
    for _name, _function, _key in (
        ("head_matmul", head_matmul_native, "CompositeExplicitAutograd"),
        ("head_matmul_plain", head_matmul_native, "CompositeImplicitAutograd"),
        ("head_matmul_cpu", _packed_product, "CompositeExplicitAutograd"),
        ("head_matmul_unpacked", _packed_product, "CompositeImplicitAutograd"),
    ):
        _library.define(f"{_name}(Tensor x, Tensor weight) -> Tensor")
        _library.impl(_name, _function, _key)
        if _key == "CompositeExplicitAutograd":
            torch.library.register_fake(f"piecework::{_name}", _head_matmul_fake, lib=_library)
