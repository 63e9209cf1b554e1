"""What generated tests of IR ops share: cases, and how results are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from piecework.ops.ir.op import IrOp

SEEDS = tuple(range(12))
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def assert_close(op: IrOp, found: Any, expected: Any, *, dtype: torch.dtype) -> None:
    """Compare results: floats at the op's tolerance, quantized values to one step, numbers of experts exactly."""
    pairs = zip(_several(found), _several(expected), strict=True)
    for a, b in pairs:
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        if a.dtype in FP8:
            torch.testing.assert_close(a.float(), b.float(), rtol=0.126, atol=2**-9)
        elif a.dtype == torch.int8:
            torch.testing.assert_close(a.int(), b.int(), rtol=0, atol=1)
        elif a.is_floating_point():
            tolerance = op.tolerance[dtype]
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(a, b)


def _several(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
