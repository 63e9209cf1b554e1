"""Sizes from 1: code that asks whether a size is 1 mostly means a shortcut, and sometimes something else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.capture.general import working_ranges
from piecework.capture.request import Dim
from piecework.errors import ShapeContractError
from piecework.spec.compile_options import BackendName, CompileOptions

EAGER = CompileOptions(backend=BackendName.EAGER)


class Shortcut(nn.Module):
    """One row needs no softmax over rows: the general way gives the same."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.linear(x)
        weights = torch.ones_like(made) if x.shape[0] == 1 else made.softmax(0)
        return weights * made


class Otherwise(Shortcut):
    """One row is something else altogether."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.linear(x)
        return made.sigmoid() if x.shape[0] < 2 else made.tanh()


class Gated(Shortcut):
    """As freshly made diffusion transformers are: what a branch computes is multiplied by zero until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.linear(x)
        return x + self.gate * (made if x.shape[0] > 1 else -made)


class Both(nn.Module):
    """Two sizes, both of which go another way for 1."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 3 if x.shape[0] == 1 else x + 1
        return x - 2 if x.shape[1] > 1 else x.exp()


def compiled(module: nn.Module, example: Tensor, dynamic: Mapping[str, Dim], out: Path) -> tuple[Any, Any]:
    bundle = piecework.compile(module, (example,), dynamic=dynamic, options=EAGER, out=out)
    return piecework.load(bundle, weights=module), bundle.record()


@pytest.mark.parametrize(("cls", "apart"), [(Shortcut, 0), (Otherwise, 1), (Gated, 1)])
def test_a_size_of_1(cls: type[nn.Module], apart: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = cls()
    model, record = compiled(module, torch.randn(3, 8), {"rows": Dim(1, 64)}, tmp_path / "b")
    assert len(model.plan.variants) == apart
    assert sum("rows = 1 has pieces of its own" in note for note in record.notes) == apart
    with torch.no_grad():
        if isinstance(module, Gated):
            module.gate.fill_(0.5)
            model = piecework.load(tmp_path / "b", weights=module)
        for rows in (1, 2, 5, 64):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(model(x), module(x))


def test_two_sizes_of_1(tmp_path: Path) -> None:
    dynamic = {"rows": Dim(1, 9, axes={"x": 0}), "columns": Dim(1, 9, axes={"x": 1})}
    module = Both()
    model, _ = compiled(module, torch.randn(3, 4), dynamic, tmp_path / "b")
    for shape in ((3, 4), (1, 4), (3, 1), (1, 1), (9, 9)):
        x = torch.randn(*shape)
        torch.testing.assert_close(model(x), module(x))


class Window(nn.Module):
    """Another way below some numbers of rows and of columns."""

    def __init__(self, rows: tuple[int, ...] = (), columns: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.lines = (rows, columns)

    def forward(self, x: Tensor) -> Tensor:
        for size, lines in zip(x.shape, self.lines, strict=True):
            x = next((x * line for line in lines if size < line), x.sin())
        return x


TWO = {"rows": Dim(1, 9, axes={"x": 0}), "columns": Dim(1, 128, axes={"x": 1})}


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        (Window((4,)), ["rows from 1 to 3"]),
        (Window((), (16, 64)), ["columns from 1 to 15", "columns from 16 to 63"]),
        (Window((4,), (64,)), ["columns from 1 to 63, rows from 1 to 3", "rows from 1 to 3", "columns from 1 to 63"]),
    ],
)
def test_a_range_in_parts(module: nn.Module, parts: list[str], tmp_path: Path) -> None:
    model, record = compiled(module, torch.randn(3, 40), TWO, tmp_path / "b")
    assert [variant.name for variant in model.plan.variants] == parts
    assert all(f"{part} has pieces of its own" in " ".join(record.notes) for part in parts if "," not in part)
    for rows in (1, 3, 4, 9):
        for columns in (1, 15, 16, 63, 64, 128):
            x = torch.randn(rows, columns)
            torch.testing.assert_close(model(x), module(x))


def test_more_than_four_parts_are_an_error_about_the_whole_range(tmp_path: Path) -> None:
    with pytest.raises(ShapeContractError) as caught:
        compiled(Window((), (8, 16, 32, 64)), torch.randn(3, 40), TWO, tmp_path / "b")
    assert "only where columns < 64 and" in caught.value.found
    assert "declare columns = Dim(32, 63)" in caught.value.try_


class Even(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0] // 2, -1) if x.shape[0] % 2 == 0 else x


class Number(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * int(x.shape[0])


@pytest.mark.parametrize(
    ("module", "found", "try_"),
    [
        (Number(), "for a single value of rows, which the code uses as a number", "change the line"),
        (Even(), "Mod", "declare a range in which that holds"),
    ],
)
def test_what_would_work_is_said(module: nn.Module, found: str, try_: str, tmp_path: Path) -> None:
    with pytest.raises(ShapeContractError) as caught:
        compiled(module, torch.randn(24, 4), {"rows": Dim(1, 64)}, tmp_path / "b")
    assert found in caught.value.found
    assert try_ in caught.value.try_
    assert "Eq(" not in caught.value.found or "Mod" in caught.value.found
    assert "test_general.py" in caught.value.location


@pytest.mark.parametrize(
    ("condition", "least", "most"),
    [
        ("n > 1", 2, 64),
        ("Ne(n, 1)", 2, 64),
        ("n >= 16", 16, 64),
        ("n <= 40", 1, 40),
        ("n >= 16 and n < 48", 16, 47),
        ("Eq(n, 39)", None, None),
        ("Eq(Mod(n, 8), 0)", None, None),
        ("n < m", None, None),
    ],
)
def test_working_ranges(condition: str, least: int | None, most: int | None) -> None:
    sizes = {"n": Dim(1, 64), "m": Dim(1, 8)}
    found = working_ranges(condition.split(" and "), sizes).get("n")
    assert (None if found is None else (found.min, found.max)) == (None if least is None else (least, most))


class Counting(nn.Module):
    """A forward that goes another way for 1, draws random numbers, and has norms that count what they see."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).relu() if x.shape[0] > 1 else x * 2
        return x + torch.rand_like(x)


def test_nothing_of_the_users_changes(tmp_path: Path) -> None:
    module, x = Counting().train(), torch.randn(3, 8)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    example, state = x.clone(), torch.get_rng_state()
    compiled(module, x, {"rows": Dim(1, 64)}, tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, example)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


class Writing(Shortcut):
    """Its buffer is written to, in the general way and for 1."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        made = super().forward(x)
        if not torch.compiler.is_compiling() and type(x) is Tensor and type(self.seen) is Tensor:
            self.seen.add_(1.0)  # as a count that a trace doesn't see
        return made


def test_a_buffer_that_only_a_real_run_writes_to_stays(tmp_path: Path) -> None:
    module = Writing()
    compiled(module, torch.randn(3, 8), {"rows": Dim(1, 64)}, tmp_path / "b")
    assert torch.equal(module.seen, torch.zeros(8))  # type: ignore[arg-type]
