"""Stacks whose blocks differ in their names only, and how many of them were traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from piecework.capture.capture import CapturedGraph, capture
from piecework.capture.cuts import is_opaque
from tests.unit.capture.graphs import Stack, listing, request


class Block(nn.Module):
    """A linear layer, and whatever `use(block, x)` does with the attributes."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.use = use
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, torch.relu(self.linear(x)))


def stack(use: Callable[[Any, Tensor], Tensor], **attributes: Sequence[Any]) -> Stack:
    """Return a stack whose i-th block has the i-th value of every attribute."""
    rows = zip(*attributes.values(), strict=True)
    return Stack([Block(use, **dict(zip(attributes, row, strict=True))) for row in rows])


def check(module: nn.Module, *, traced: int | None = None, stamped: int | None = None, note: str = "") -> CapturedGraph:
    """Capture a module with templates and without, compare node for node and with eager; then counts and notes."""
    made, whole = capture(request(module)), capture(request(module), templates=False)
    assert listing(made) == listing(whole)
    for rows in (1, 5):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            assert torch.allclose(run(made, module, x), module(x), rtol=1e-5)
    counts = made.stacks
    found = [counts.traced, counts.stamped]
    assert found == [traced if traced is not None else found[0], stamped if stamped is not None else found[1]], counts
    alone = [n for n in counts.notes if "no two of" in n]  # said where each block is of another kind
    others = [n for n in counts.notes if n not in alone]
    assert not (alone and counts.stamped), counts
    assert any(note in n for n in others) if note else not others, counts.notes
    return made


def run(made: CapturedGraph, module: nn.Module, x: Tensor) -> Tensor:
    """Run a captured graph."""
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers()), **made.literals}
    by_node = {i.node: x if i.name == "x0" else weights[i.name] for i in made.inputs}
    order = [by_node[n] for n in made.graph.nodes if n.op == "placeholder"]
    result: Tensor = torch.fx.Interpreter(torch.fx.GraphModule(nn.Module(), made.graph)).run(*order)[0]
    return result


def names(made: CapturedGraph) -> list[Any]:
    """Return the arguments, beside tensors, of the opaque ops in order."""
    calls = [n for n in made.graph.nodes if n.op == "call_function" and is_opaque(n, frozenset())]
    return [a for n in calls for a in (*n.args, *n.kwargs.values()) if not isinstance(a, torch.fx.Node)]
