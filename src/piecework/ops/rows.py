"""`piecework::rows`: some rows of a tensor, as an operator of its own.

A plan runs it as a view, at no cost. Called through torch it is a copy, because an operator's result may not share
memory with its arguments; strides are those of the view in both cases.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from piecework.ops.opaque_op import opaque_op

ROWS_OP: Final = "piecework::rows"


@opaque_op(ROWS_OP, cuda_graph_safe=True)
def rows(x: Tensor, begin: int, count: int) -> Tensor:
    """Return rows begin … begin + count - 1 of x [T, ...], any dtype: [count, ...], with the strides of x.

    Raises IndexError or RuntimeError where x has no such rows.
    """
    view = x.narrow(0, begin, count)
    return torch.empty_strided(view.shape, view.stride(), dtype=x.dtype, device=x.device).copy_(view)


def rows_view(x: Tensor, begin: int, count: int) -> Tensor:
    """Return the same rows without copying them."""
    return x.narrow(0, begin, count)


@rows.fake
def _rows_fake(x: Tensor, begin: int, count: int) -> Tensor:
    return torch.empty_strided((count, *x.shape[1:]), x.stride(), dtype=x.dtype, device=x.device)
