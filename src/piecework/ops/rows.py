"""`piecework::rows`: some rows of a tensor, as an operator of its own.

A plan runs it as a view where the tensor's rows lie together, else as a copy of these rows. Called through torch it is
always a copy, because an operator's result may not share memory with its arguments. What comes out is contiguous in all
cases, so that no piece depends on how another lays out what it gives.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from piecework.ops.ir.opaque_op import opaque_op

ROWS_OP: Final = "piecework::rows"


@opaque_op(ROWS_OP, cuda_graph_safe=True)
def rows(x: Tensor, begin: int, count: int) -> Tensor:
    """Return rows begin … begin + count - 1 of x [T, ...], any dtype and strides: [count, ...], contiguous.

    Raises IndexError or RuntimeError where x has no such rows.
    """
    view = x.narrow(0, begin, count)
    return view.new_empty(view.shape).copy_(view)


def rows_view(x: Tensor, begin: int, count: int) -> Tensor:
    """Return the same rows, without copying them where x is contiguous."""
    return x.narrow(0, begin, count).contiguous()


@rows.fake
def _rows_fake(x: Tensor, begin: int, count: int) -> Tensor:
    return x.new_empty((count, *x.shape[1:]))
