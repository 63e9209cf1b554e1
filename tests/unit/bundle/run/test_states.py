"""Memory for states: zeros, whatever their size, and none before they are used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from piecework.bundle.run.states import zeros


@pytest.mark.parametrize("shape", [(2, 1, 16, 2, 4), (2, 4096, 16, 2, 16), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_to_write_to(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = zeros(shape, dtype=dtype, device="cpu")
    assert (tuple(made.shape), made.dtype, made.is_contiguous()) == (shape, dtype, True)
    assert not made.any()
    if made.numel():
        made[-1, 0] = 3
        assert made.sum() == 3 * made[-1, 0].numel()


def test_memory_comes_when_it_is_used() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_bytes()
    made = zeros((1 << 30,), dtype=torch.float32, device="cpu")
    assert resident_bytes() - before < 1 << 28
    made[: 1 << 26] = 1
    assert resident_bytes() - before >= 1 << 28


def test_more_than_there_can_be() -> None:
    for shape in [(1 << 48,), (1 << 62, 16)]:
        with pytest.raises((RuntimeError, OSError)):
            zeros(shape, dtype=torch.float32, device="cpu")
