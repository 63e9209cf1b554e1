"""`piecework::head_matmul`: every head's tokens times the head's own matrix, one operator in captured graphs.

Latent attention's absorbed projections are that. It is a batched matrix product, with tokens before heads on both sides
as the layers around it have them, so that nothing is turned about in memory. Kept whole, a compile may have it done by
code of its own, on matrices that were packed at load (compiler/passes/native_matmul.py); anywhere else it is torch's
`bmm`.

Shape suffixes: T tokens, H heads, K rows of a head's matrix, W its columns.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from piecework.ops.packed import unpacked_matrices

HEAD_MATMUL_OP: Final = "piecework::head_matmul"
_library: Final = torch.library.Library("piecework", "FRAGMENT")


def head_matmul_native(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [T, H, K] times weight [H, K, W], head by head: [T, H, W], contiguous, in x's dtype."""
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1).contiguous()


def head_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Do what `head_matmul_native` does, as one operator."""
    made: Tensor = torch.ops.piecework.head_matmul.default(x, weight)
    return made


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
