"""Kinds of modules: arguments without names, numbers as results, and buffers that the forward changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
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


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))


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


class Recurrent(nn.Module):
    """A recurrent layer over its first axis, or the second, between two linear ones."""

    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(8, 6), kind(6, 4, num_layers=2, **options)
        self.after = nn.Linear(8 if options.get("bidirectional") else 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        out, last = self.layer(self.before(x).relu())
        return self.after(out), last


RECURRENT: list[tuple[Callable[..., nn.Module], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.GRU, {"bidirectional": True, "batch_first": True}),
    (nn.RNN, {"nonlinearity": "relu", "bias": False}),
]


@pytest.mark.parametrize("backend", [BackendName.EAGER, pytest.param(BackendName.AOTI, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "given"), RECURRENT, ids=lambda value: getattr(value, "__name__", ""))
def test_recurrent_layers_take_any_length(
    kind: Callable[..., nn.Module], given: dict[str, Any], backend: BackendName, tmp_path: Path
) -> None:
    module = Recurrent(kind, **given).eval()
    axis = 1 if given.get("batch_first") else 0

    def example(length: int) -> Tensor:
        return torch.randn(2, length, 8) if axis else torch.randn(length, 2, 8)

    options = CompileOptions(backend=backend)
    lengths = {"length": Dim(1, 64, axes={"x": axis})}
    bundle = piecework.compile(module, (example(5),), dynamic=lengths, options=options, out=tmp_path / "b")
    model = piecework.load(bundle, weights=module)
    for length in (1, 7, 64):
        x = example(length)
        torch.testing.assert_close(model(x), module(x), atol=1e-5, rtol=1e-5)


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


class Changing(nn.Module):
    """Has buffers that a function changes."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(8), persistent=False)
        self.register_buffer("last", torch.ones(8))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.linear(x))


def add_in_place(m: Any, x: Tensor) -> Any:
    m.count += x.shape[0]
    m.mean.mul_(0.5).add_(x.detach().mean(0))
    return x * m.count - m.mean


def assign(m: Any, x: Tensor) -> Any:
    m.count = m.count + 1
    m.mean, m.last = m.last, x.detach().sum(0)
    return x + m.mean, m.count


def write_a_part(m: Any, x: Tensor) -> Any:
    m.mean[2:6] = x.detach().sum(0)[2:6]
    m.last.view(2, 4)[0].zero_()
    return x + m.mean - m.last


def change_for_some_sizes(m: Any, x: Tensor) -> Any:
    if x.shape[0] > 1:
        m.count += 1
    return x * m.count


@pytest.mark.parametrize("function", [add_in_place, assign, write_a_part, change_for_some_sizes])
def test_buffers_keep_what_the_forward_writes(function: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Changing(function).requires_grad_(False)
    alone = copy.deepcopy(module)
    model = loaded(module, (torch.randn(3, 8),), tmp_path)
    assert all(map(torch.equal, module.buffers(), alone.buffers())), "a compile changes nothing"
    for rows in (3, 1, 64, 2):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(model(x), alone(x))
    for name, buffer in alone.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), buffer)
        assert name not in model.states or model.states[name].data_ptr() == module.get_buffer(name).data_ptr()


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.linear(x))
        return x + found


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Norm() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_buffers_of_stamped_blocks_from_a_state_dict(tmp_path: Path) -> None:
    module = Norms().train().requires_grad_(False)
    alone = copy.deepcopy(module)
    options = CompileOptions(backend=BackendName.EAGER)
    rows = {"rows": Dim(2, 64)}
    bundle = piecework.compile(module, (torch.randn(3, 8),), dynamic=rows, options=options, out=tmp_path / "b")
    assert bundle.record().counts["blocks_stamped"] == 3
    assert any("the forward changes blocks.0.norm.num_batches_tracked, " in note for note in bundle.record().notes)
    weights = module.state_dict()
    model = piecework.load(bundle, weights=weights)
    for _ in range(3):
        x = torch.randn(5, 8)
        torch.testing.assert_close(model(x), alone(x))
    torch.testing.assert_close(weights, alone.state_dict())


def of_another_shape(m: Any, x: Tensor) -> Any:
    m.mean = x.sum(0)[:4]
    return x


def of_a_parameter(m: Any, x: Tensor) -> Any:
    m.linear.weight.add_(1)
    return x


@pytest.mark.parametrize(
    ("function", "found"),
    [(of_another_shape, "puts a tensor of another shape or type in place of mean"), (of_a_parameter, "linear.weight")],
)
def test_other_changes_are_refused(function: Callable[..., Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=found):
        loaded(Changing(function), (torch.randn(3, 8),), tmp_path)
