"""Captured graphs in a form that can be compared: nodes by position, inputs by what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from piecework.capture.capture import CapturedGraph, capture
from piecework.capture.request import CaptureRequest, Dim, TensorInput
from piecework.compiler.split import Piece, split
from piecework.ops.ir.layer import LayerName
from piecework.ops.ir.program import Program
from tests.unit.capture.name_ops import by_layer


def listing(captured: CapturedGraph) -> list[tuple[str, ...]]:
    """Return every node but the placeholders: operator, arguments and metadata, without any node's name."""
    numbers: dict[torch.fx.Node, str] = {i.node: f"{i.kind.value} {i.name}" for i in captured.inputs}
    lines = []
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            assert node in numbers
            continue
        numbers[node] = f"%{len(lines)}"

        def named(x: Any) -> Any:
            return numbers[x] if isinstance(x, torch.fx.Node) else x

        def written(arguments: Any) -> str:
            return str(torch.fx.node.map_aggregate(arguments, named))

        lines.append((node.op, str(node.target), written(node.args), written(node.kwargs), _metadata(node)))
    return lines


def _metadata(node: torch.fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return f"{value.dtype} {[str(d) for d in value.shape]} {[str(d) for d in value.stride()]}"
    return str(value)


def request(
    module: nn.Module,
    *shapes: Sequence[int | str],
    sizes: Mapping[str, Dim] | None = None,
    states: Mapping[str, TensorInput] | None = None,
    opaque: frozenset[str] = frozenset(),
    dtype: str = "float32",
) -> CaptureRequest:
    """Return a request whose inputs x0, x1 … are passed by position; `rows` is 1 to 64 by default."""
    inputs = tuple(TensorInput(f"x{i}", tuple(s), dtype) for i, s in enumerate(shapes or [("rows", 8)]))
    return CaptureRequest(
        module=module,
        call=lambda target, given: target(*(given[i.name] for i in inputs)),
        inputs=inputs,
        sizes=sizes or {"rows": Dim(1, 64)},
        states=states or {},
        opaque=opaque,
    )


def programs(wanted: CaptureRequest, *, templates: bool = True) -> list[Program]:
    """Return the programs of all pieces, in order."""
    return [s.program for s in split(capture(wanted, templates=templates)) if isinstance(s, Piece)]


def assert_stamped_equals_traced(wanted: CaptureRequest, *, traced: int, stamped: int) -> CapturedGraph:
    """Capture both ways, compare node for node, and check how many blocks were traced."""
    made, whole = capture(wanted), capture(wanted, templates=False)
    differing = [pair for pair in zip(listing(made), listing(whole), strict=True) if pair[0] != pair[1]]
    assert not differing, differing[0]
    assert {(i.kind, i.name) for i in made.inputs} == {(i.kind, i.name) for i in whole.inputs}
    assert made.structure == whole.structure
    assert (made.stacks.traced, made.stacks.stamped) == (traced, stamped)
    assert (whole.stacks.traced, whole.stacks.stamped) == (0, 0)
    return made


class Block(nn.Module):
    """Norm, linear, activation and residual, with a constant."""

    def __init__(self, size: int = 8, *, scale: float = 0.5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.linear = nn.Linear(size, size)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.silu(self.linear(self.norm(x))) * self.scale


class Stack(nn.Module):
    """Blocks in a ModuleList, one after the other."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Attention(nn.Module):
    """Full attention over the rows, no cache."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        rows, size = x.shape
        q, k, v = self.qkv(x).view(rows, 3, self.heads, size // self.heads).permute(1, 2, 0, 3)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(0, 1).reshape(rows, size))


class EncoderBlock(nn.Module):
    """A pre-norm encoder layer."""

    def __init__(self, size: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.attention = Attention(size, heads)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Token ids [rows] to features [rows, 16]: embeddings, encoder layers, a norm; positions are a computed buffer."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(EncoderBlock() for _ in range(layers))
        self.norm = nn.LayerNorm(16)
        self.register_buffer("positions", torch.arange(64 * 16).view(64, 16).float().sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[0]]
        for layer in self.layers:
            x = layer(x, mask=None)
        return self.norm(x)


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def _named_scale(x: Tensor, name: str) -> Tensor:
    return x * (len(name) + 1)


def _register() -> None:
    library = torch.library.Library("pwtest", "FRAGMENT")
    library.define("named(Tensor x, str name) -> Tensor")
    library.impl("named", _named_scale, "CompositeExplicitAutograd")
    torch.library.register_fake("pwtest::named", lambda x, name: torch.empty_like(x), lib=library)
    library.define("count(Tensor(a!) seen, Tensor x) -> Tensor")
    library.impl("count", _count, "CompositeExplicitAutograd")
    torch.library.register_fake("pwtest::count", lambda seen, x: torch.empty_like(x), lib=library)
    library.define("two(Tensor x, SymInt n, float f) -> (Tensor, Tensor)")
    library.impl("two", lambda x, n, f: (x + n, x * f), "CompositeExplicitAutograd")
    torch.library.register_fake("pwtest::two", lambda x, n, f: (torch.empty_like(x), torch.empty_like(x)), lib=library)
    globals()["_library"] = library  # registrations last as long as it


def _count(seen: Tensor, x: Tensor) -> Tensor:
    seen.add_(x.shape[0])
    return x + seen


_register()
NAMED = frozenset({"pwtest::named"})
COUNT = frozenset({"pwtest::count"})
TWO = frozenset({"pwtest::two"})


class NamedBlock(nn.Module):
    """A linear layer, then an opaque op that takes the layer's name."""

    def __init__(self, name: str | LayerName) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.handle = name
        self.op = by_layer if isinstance(name, LayerName) else torch.ops.pwtest.named

    def forward(self, x: Tensor) -> Tensor:
        return self.op(torch.relu(self.linear(x)), self.handle)
