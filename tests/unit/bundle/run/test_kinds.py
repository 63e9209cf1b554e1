"""Kinds of modules: arguments without names, and numbers as results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.capture.request import Dim
from piecework.errors import CaptureError, RequestError
from piecework.spec.compile_options import BackendName, CompileOptions

ROWS = {"rows": Dim(1, 64)}


def loaded(module: nn.Module, args: tuple[Any, ...], out: Path, **kwargs: Any) -> piecework.LoadedModel:
    options = CompileOptions(backend=BackendName.EAGER)
    bundle = piecework.compile(module, args, kwargs, dynamic=ROWS, options=options, out=out / "b")
    return piecework.load(bundle, weights=module)


class Sum(nn.Module):
    """Takes any number of tensors, and one by name."""

    def forward(self, x: Tensor, *others: Tensor, gain: float = 1.0) -> Tensor:
        return sum((other * gain for other in others), x)


def test_arguments_without_names(tmp_path: Path) -> None:
    module = Sum()
    model = loaded(module, (torch.randn(3, 8),) * 3, tmp_path, gain=2.0)
    for rows in (1, 64):
        given = [torch.randn(rows, 8) for _ in range(3)]
        torch.testing.assert_close(model(*given, gain=2.0), module(*given, gain=2.0))
    with pytest.raises(RequestError):
        model(*given[:2], gain=2.0)
    with pytest.raises(RequestError):
        model(*given, *given, gain=2.0)


def test_no_arguments_where_any_number_may_be(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    model = loaded(Sum(), (x,), tmp_path)
    assert torch.equal(model(x), x)
    with pytest.raises(RequestError):
        model(x, x)


class Counts(nn.Module):
    """Returns how many rows it was given, and what follows from that."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        rows = x.shape[0]
        return {"x": x * 2, "rows": rows, "more": (2 * rows + 1, rows // 3, 7)}


def test_sizes_as_results(tmp_path: Path) -> None:
    module = Counts()
    model = loaded(module, (torch.randn(3, 8),), tmp_path)
    for rows in (1, 5, 64):
        x = torch.randn(rows, 8)
        found = model(x)
        assert torch.equal(found.pop("x"), x * 2)
        assert found == {"rows": rows, "more": (2 * rows + 1, rows // 3, 7)}
        assert type(found["rows"]) is int


class Otherwise(nn.Module):
    def __init__(self, *, fits: bool) -> None:
        super().__init__()
        self.fits = fits

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        if x.shape[0] < 2:
            return x.sin(), x.shape[0] if self.fits else 7
        return x.cos(), x.shape[0]


def test_results_of_parts_are_made_up_the_same_way(tmp_path: Path) -> None:
    model = loaded(Otherwise(fits=True), (torch.randn(3, 8),), tmp_path)
    assert [model(torch.randn(rows, 8))[1] for rows in (1, 2, 64)] == [1, 2, 64]
    with pytest.raises(CaptureError, match="where rows = 1, it returns something else"):
        loaded(Otherwise(fits=False), (torch.randn(3, 8),), tmp_path / "c")


class Found(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        found = x[x > 0]
        return found, found.shape[0]


def test_a_number_that_depends_on_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="depends on values"):
        loaded(Found(), (torch.randn(3, 8),), tmp_path)
