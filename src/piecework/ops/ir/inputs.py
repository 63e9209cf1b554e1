"""Arguments for tests of an op: shapes, options and values that follow from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar, final

import torch
from torch import Tensor

_T = TypeVar("_T")

ROWS: Final = (1, 0, 2, 7, 33, 3)
"""Rows (tokens) of the first seeds; none and one come early."""

WIDTHS: Final = (64, 17, 1, 250, 128, 96)


@final
class Draw:
    """Draws the arguments of one test case.

    Args:
        seed: which case; small ones go through `ROWS`.
        dtype: of the tensors that are drawn.
        device: where they are.
    """

    def __init__(self, seed: int, *, dtype: torch.dtype, device: str) -> None:
        self.dtype = dtype
        self.device = device
        self.rows = ROWS[seed % len(ROWS)]
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, options: Sequence[_T]) -> _T:
        """Return one of the options; consecutive seeds give all of them."""
        return options[self._seed % len(options)]

    def width(self, *, multiple_of: int = 1) -> int:
        """Return a length of rows, 1 and odd ones included."""
        return self.choose(WIDTHS) if multiple_of == 1 else multiple_of * (1 + self._seed % 3)

    def tensor(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Return normally distributed values of the case's dtype, contiguous."""
        values = torch.randn(shape, generator=self._generator) * scale
        return values.to(dtype or self.dtype).to(self.device)

    def distinct(self, rows: int, width: int) -> Tensor:
        """Return rows [rows, width] in which no value occurs twice, in any dtype and up to 256 wide."""
        order = torch.stack([torch.randperm(width, generator=self._generator) for _ in range(rows)] or [torch.empty(0)])
        return (order.view(rows, width) / 16 - 2).to(self.dtype).to(self.device)
