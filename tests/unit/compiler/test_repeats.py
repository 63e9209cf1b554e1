"""Modules of nobody's: however deep they are, they have as many unique pieces."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import piecework
from piecework.capture.request import Dim
from piecework.spec.compile_options import BackendName, CompileOptions

EAGER = CompileOptions(backend=BackendName.EAGER)


class Mlp(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 32)
        self.down = nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(functional.gelu(self.up(self.norm(x))))
        return x + made


class Attention(nn.Module):
    """Attention by its public name, or written out."""

    def __init__(self, *, by_name: bool) -> None:
        super().__init__()
        self.by_name = by_name
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.by_name:
            made = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            made = ((q @ k.transpose(-1, -2)) / 2.8).softmax(-1) @ v
        mixed: Tensor = self.mlp(x + self.out(made.transpose(1, 2).flatten(2)))
        return mixed


class InList(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        made: Tensor = self.head(x)
        return made


class InDict(InList):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"block{i}": block for i, block in enumerate(blocks)})  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        for name in self.blocks:
            x = self.blocks[name](x)  # type: ignore[index]
        made: Tensor = self.head(x)
        return made


class ByName(nn.Module):
    """As models are written that don't know of `ModuleList`."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.count = len(blocks)
        for i, block in enumerate(blocks):
            setattr(self, f"block_{i}", block)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.count):
            x = getattr(self, f"block_{i}")(x)
        return x


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.second(functional.relu(self.norm(self.first(x)))))


def mlps(depth: int) -> list[nn.Module]:
    return [Mlp() for _ in range(depth)]


def kinds(depth: int) -> list[nn.Module]:
    return [Attention(by_name=False) if i % 2 else Mlp() for i in range(depth)]


STACKS: dict[str, Callable[[int], nn.Module]] = {
    "ModuleList": lambda depth: InList(*mlps(depth)),
    "Sequential": lambda depth: nn.Sequential(*mlps(depth)),
    "ModuleDict": lambda depth: InDict(*mlps(depth)),
    "by name": lambda depth: ByName(*mlps(depth)),
    "two kinds": lambda depth: InList(*kinds(depth)),
    "two stacks": lambda depth: nn.Sequential(InList(*mlps(depth)), nn.Linear(3, 16), InList(*kinds(depth))),
    "attention by name": lambda depth: InList(*(Attention(by_name=True) for _ in range(depth))),
    "attention written out": lambda depth: InList(*(Attention(by_name=False) for _ in range(depth))),
}


def compiled(module: nn.Module, example: Tensor, tmp_path: Path) -> tuple[int, int, piecework.LoadedModel]:
    """Return how many pieces and unique pieces a module has, and the loaded model."""
    bundle = piecework.compile(module, (example,), dynamic={"rows": Dim(1, 64)}, options=EAGER, out=tmp_path / "b")
    counts = bundle.record().counts
    return counts["pieces"], counts["unique_pieces"], piecework.load(bundle, weights=module)


@pytest.mark.parametrize("kind", STACKS)
def test_unique_pieces_dont_grow_with_depth(kind: str, tmp_path: Path) -> None:
    found = {}
    for depth in (4, 12):
        torch.manual_seed(depth)
        module = STACKS[kind](depth).eval()
        pieces, found[depth], model = compiled(module, torch.randn(3, 5, 16), tmp_path / str(depth))
        assert pieces >= depth / 2
        for rows in (1, 2, 7):
            x = torch.randn(rows, 5, 16)
            with torch.no_grad():
                torch.testing.assert_close(model(x), module(x), atol=1e-5, rtol=1e-5)
    assert found[4] == found[12] <= 5


def test_stages_of_other_widths(tmp_path: Path) -> None:
    def stage(width: int, depth: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width // 2, width, 3, padding=1), *(Residual(width) for _ in range(depth)))

    found = {}
    for depth in (4, 6):
        module = nn.Sequential(stage(8, depth), stage(16, depth)).eval()
        _, found[depth], model = compiled(module, torch.randn(3, 4, 8, 8), tmp_path / str(depth))
        x = torch.randn(2, 4, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(model(x), module(x), atol=1e-5, rtol=1e-5)
    assert found[4] == found[6] == 4


@pytest.mark.parametrize(
    "module",
    [
        InList(*mlps(2)),
        nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)),
    ],
)
def test_what_would_save_little_stays_one_piece(module: nn.Module, tmp_path: Path) -> None:
    pieces, _, _ = compiled(module, torch.randn(3, 16), tmp_path)
    assert pieces == 1


class Smooth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(20):
            x = torch.tanh(x * 0.5 + x.sin())
        return x


def test_a_loop_over_elements_stays_one_piece(tmp_path: Path) -> None:
    """One kernel that keeps each element in a register, and not twenty."""
    pieces, _, _ = compiled(Smooth(), torch.randn(3, 16), tmp_path)
    assert pieces == 1


def test_equal_parts_inside_equal_parts(tmp_path: Path) -> None:
    """Three layers of one kind and one of another, again and again: each kind once, and not all four as one piece."""
    module = InList(*(Mlp() if i % 4 == 3 else Attention(by_name=False) for i in range(16))).eval()
    pieces, unique, _ = compiled(module, torch.randn(3, 5, 16), tmp_path)
    assert pieces >= 16
    assert unique <= 5


class Power(nn.Module):
    def __init__(self, exponent: int) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: Tensor) -> Tensor:
        return x**self.exponent


def widths(*sizes: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in pairwise(sizes)))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Smooth(), "the module is one piece of 80 operators: what repeats has no product of matrices"),
        (widths(*range(16, 33)), "the module is one piece of 32 operators: no two parts of it are equal"),
        (
            nn.Sequential(widths(16, 16, 16, 16, 16), widths(*range(16, 31))),
            "of 36 operators: its equal parts would save 6 operators, and less than 16 are not worth a cut",
        ),
        (InList(Power(2), Power(3), Power(4)), "Power blocks are traced one by one: no two of the 3 do the same"),
        (InList(*mlps(2)), None),
    ],
)
def test_what_could_not_be_shared_is_said(
    module: nn.Module, said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = CompileOptions(backend=BackendName.EAGER)
    example, sizes = torch.randn(3, 16), {"rows": Dim(1, 64)}
    notes = piecework.compile(module, (example,), dynamic=sizes, options=options, out=tmp_path / "b").record().notes
    told = [record.getMessage() for record in caplog.records if record.name == "piecework"]
    assert tuple(told) == notes
    assert not told if said is None else said in told[0]
