"""Hand-made models whose layers are cut by an opaque op that takes the layer's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import piecework
from piecework.capture.request import Dim
from piecework.report.explain import ExplainReport
from piecework.spec.compile_options import BackendName, CompileOptions

EAGER = CompileOptions(backend=BackendName.EAGER)
ROWS = {"rows": Dim(1, 64)}
OP = "pwexplain::mix"
Activation = Callable[[Tensor], Tensor]


@torch.library.custom_op(OP, mutates_args=())
def mix(x: Tensor, name: str) -> Tensor:
    return x + len(name)


@mix.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


class Block(nn.Module):
    """A norm and a linear layer before the opaque op, a linear layer and an MLP after it."""

    def __init__(self, number: int, *, width: int = 32, act: Activation = nn.functional.silu, eps: float = 1e-5):
        super().__init__()
        self.name = f"layers.{number}.mix"
        self.norm = nn.LayerNorm(16, eps=eps)
        self.inner, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, width), nn.Linear(width, 16)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(torch.ops.pwexplain.mix(self.inner(self.norm(x)), self.name))
        return x + self.down(self.act(self.up(x)))


class Sum(Block):
    """As Block, with the sum over two branches in another order."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.ops.pwexplain.mix(self.inner(self.norm(x)), self.name)
        up = self.act(self.up(x))
        return x + self.out(h) + self.down(up)


class Gated(Block):
    """Another kind of layer: cut twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + torch.ops.pwexplain.mix(torch.sigmoid(self.up(x)), self.name).sum(-1, keepdim=True)


class Model(nn.Module):
    """Token ids [rows] to features [rows, 16]."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(blocks)
        self.final = nn.LayerNorm(16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = block(x)
        return self.final(x)


class Two(nn.Module):
    """Two stacks, one after the other."""

    def __init__(self, first: Sequence[nn.Module], second: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.ModuleList(first), nn.ModuleList(second)

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.encoder, *self.decoder):
            x = block(x)
        return x


def model(changed: dict[int, dict[str, Any]] | None = None, *, layers: int = 6) -> Model:
    """Return a model whose layers are the same but for what `changed` says of them."""
    return Model([Block(number, **(changed or {}).get(number, {})) for number in range(layers)])


def explained(
    module: nn.Module, *, layers: tuple[int, int] | None = None, example: Tensor | None = None
) -> ExplainReport:
    """Explain a module without compiling it."""
    given = torch.zeros(4, dtype=torch.int64) if example is None else example
    return piecework.explain(module, (given,), dynamic=ROWS, opaque=[OP], layers=layers)


def compiled(module: nn.Module, out: Path, *, example: Tensor | None = None) -> piecework.Bundle:
    """Compile a module into a bundle of the eager backend."""
    given = torch.zeros(4, dtype=torch.int64) if example is None else example
    return piecework.compile(module, (given,), dynamic=ROWS, opaque=[OP], options=EAGER, out=out)
