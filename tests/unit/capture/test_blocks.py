"""Blocks that a module declares: cuts at both ends of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.capture.blocks import declared_classes
from piecework.spec.compile_options import BackendName, CompileOptions

EAGER = CompileOptions(backend=BackendName.EAGER)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(self.up(x).relu())
        return made


class Outer(nn.Module):
    """An element of a stack that isn't declared, and holds a block that is."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.block(x)
        return made


class Model(nn.Module):
    """Few operators: without a declaration they are one piece."""

    def __init__(self, kind: type[nn.Module], count: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(kind() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        made: Tensor = self.last(x)
        return made


class Declaring(Model):
    _repeated_blocks = ("Block",)


@pytest.mark.parametrize("kind", [Block, Outer])
@pytest.mark.parametrize("count", [1, 3])
def test_each_declared_block_is_a_piece(kind: type[nn.Module], count: int, tmp_path: Path) -> None:
    module = Declaring(kind, count).eval()
    bundle = piecework.compile(module, (torch.randn(3, 4),), options=EAGER, out=tmp_path / "b")
    counts = bundle.record().counts
    assert (counts["pieces"], counts["unique_pieces"]) == (count + 2, 3)
    assert "forward" not in vars(module.blocks[0])
    x = torch.randn(3, 4)
    torch.testing.assert_close(piecework.load(bundle, weights=module)(x), module(x))


def test_without_a_declaration_few_operators_are_one_piece(tmp_path: Path) -> None:
    bundle = piecework.compile(Model(Block, 3), (torch.randn(3, 4),), options=EAGER, out=tmp_path / "b")
    assert bundle.record().counts["pieces"] == 1


def test_a_block_that_writes_in_between_keeps_its_ends(tmp_path: Path) -> None:
    class Writing(Block):
        def forward(self, x: Tensor) -> Tensor:
            made = super().forward(x)
            made.add_(1.0)
            return made

    Writing.__name__ = "Block"
    module = Declaring(Writing, 2).eval()
    bundle = piecework.compile(module, (torch.randn(3, 4),), options=EAGER, out=tmp_path / "b")
    assert bundle.record().counts["pieces"] == 4


@pytest.mark.parametrize(("declared", "names"), [(["A"], {"A"}), (("A", "B"), {"A", "B"}), (None, set()), ("A", set())])
def test_what_counts_as_a_declaration(declared: object, names: set[str]) -> None:
    module = nn.Module()
    object.__setattr__(module, "_repeated_blocks", declared)
    assert declared_classes(module) == names
