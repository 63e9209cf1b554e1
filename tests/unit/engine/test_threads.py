"""How many threads an engine's process computes with."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from piecework.engine.loading import _use_threads
from piecework.foundation.cpus import Cpus


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("asked", "usual", "given", "threads"),
    [(3, 2, "", 3), (None, 4, "", 2), (None, 1, "", 1), (None, 4, "4", 4), (3, 4, "4", 3)],
    ids=["asked", "default", "a program chose fewer", "OMP_NUM_THREADS", "asked nevertheless"],
)
def test_threads(monkeypatch: pytest.MonkeyPatch, asked: int | None, usual: int, given: str, threads: int) -> None:
    monkeypatch.setattr("piecework.engine.loading.read_cpus", lambda: Cpus(allowed=8, physical=8, quota=2.5))
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    torch.set_num_threads(usual)
    _use_threads(asked)
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == threads
