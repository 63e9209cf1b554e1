"""What was compiled beside its module: how far apart they are, where that is looked at, and when it is too far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.capture.request import Dim
from piecework.errors import CheckError
from piecework.spec.compile_options import BackendName, CompileOptions

EAGER = CompileOptions(backend=BackendName.EAGER)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))


class Two(nn.Module):
    """A table that is looked up and is a weight as well, and another way below 8 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 8)
        self.linear = nn.Linear(8, 8)
        self.linear.weight = self.table.weight

    def forward(self, ids: Tensor, x: Tensor) -> dict[str, Any]:
        found = self.table(ids) + self.linear(x)
        return {"sum": found, "more": (found.argmax(-1), found * 2 if x.shape[0] < 8 else found.exp())}


class Otherwise(nn.Module):
    """Computes something else when it isn't traced."""

    def __init__(self, apart: float) -> None:
        super().__init__()
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.apart) if type(x) is Tensor else x * 1.0


def notes(module: nn.Module, args: tuple[Any, ...], dim: Dim, out: Path) -> tuple[str, ...]:
    bundle = piecework.compile(module, args, dynamic={"rows": dim}, options=EAGER, out=out, check=True)
    return bundle.record().notes


def test_errors_are_noted_by_output_at_the_ends_of_each_part(tmp_path: Path) -> None:
    module, ids = Two(), torch.tensor([3, 7, 4])
    found = notes(module, (ids, torch.randn(3, 8)), Dim(1, 64), tmp_path / "b")
    assert "checked against the module at rows = 1; rows = 7; rows = 8; rows = 64" in found
    (line,) = (note for note in found if note.startswith("output more.1: "))
    assert float(line.split()[2]) < 1e-5
    assert sum(note.startswith("output ") for note in found) == 3


def test_what_needs_too_much_memory_is_made_smaller(tmp_path: Path) -> None:
    found = notes(nn.ReLU(), (torch.randn(3, 16),), Dim(1, 1 << 32), tmp_path / "b")
    assert f"checked against the module at rows = 1; rows = {1 << 20}" in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_that_is_another_is_an_error_and_no_bundle(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.ones(3, 8, dtype=dtype)
    near, far = (0.0, 1e-3) if dtype is torch.float32 else (1e-2, 0.5)
    assert notes(Otherwise(near), (x,), Dim(2, 64), tmp_path / "near")
    with pytest.raises(CheckError) as caught:
        notes(Otherwise(far), (x,), Dim(2, 64), tmp_path / "far")
    assert "output 0" in caught.value.asked
    assert "at rows = 2" in caught.value.asked
    assert not (tmp_path / "far").exists()


class Turned(nn.Module):
    """A complex result, which a trace computes in another order."""

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.polar(torch.ones_like(x), x)
        return turned * (1 + 1e-6) if type(x) is Tensor else turned * 1.0


def test_a_complex_result(tmp_path: Path) -> None:
    found = notes(Turned(), (torch.randn(3, 8),), Dim(2, 64), tmp_path / "b")
    (line,) = (note for note in found if note.startswith("output 0: "))
    assert 0 < float(line.split()[2]) < 1e-5


class Counted(Otherwise):
    """An index that random inputs don't have."""

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            raise IndexError("of no such row")
        return x * 1.0


def test_what_cannot_be_tried_is_said(tmp_path: Path) -> None:
    found = notes(Counted(0.0), (torch.ones(3, 8),), Dim(2, 64), tmp_path / "a")
    assert "not checked at rows = 64: of random inputs the module raises IndexError: of no such row" in found
    with torch.device("meta"):
        module = nn.Linear(8, 8)
    found = notes(module, (torch.ones(3, 8),), Dim(1, 64), tmp_path / "b")
    assert "checked against the module at rows = 1; rows = 64" in found
