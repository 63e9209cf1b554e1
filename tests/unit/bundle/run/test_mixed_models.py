"""Models whose layers are not all alike: as many unique pieces as there are really different ones, counted by hand.

Every block is made of parts between its opaque ops. In the docstrings, A is what comes before the attention (norm and
projections), D a dense MLP with what comes before it, R an MoE's norm and router, M what comes after its experts. A
piece reaches from one opaque op to the next, so the last part of one block and the first of the next are one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.choice import one_in, slow_but
from tests.unit.capture.name_ops import number_of
from torch import Tensor, nn

import piecework
from piecework.capture.request import Dim
from piecework.ops.ir.layer import LayerName, LayerNameType, resolve
from piecework.ops.ir.opaque_op import opaque_op
from piecework.spec.compile_options import BackendName, CompileOptions

KINDS = ["LayerName", "str", "int"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def _attend(query: Tensor, keys: Tensor, name: str | int, window: int) -> Tensor:
    return torch.tanh(query + keys.sum(-1, keepdim=True) * number_of(name)) * (1.0 + window)


@opaque_op("pwmixed::attend_layer")
def attend_layer(query: Tensor, keys: Tensor, layer: LayerNameType, cache: LayerNameType, window: int = 0) -> Tensor:
    return _attend(query, keys * number_of(resolve(cache)), resolve(layer), window)


@opaque_op("pwmixed::attend_str")
def attend_str(query: Tensor, keys: Tensor, layer: str, cache: str, window: int = 0) -> Tensor:
    return _attend(query, keys * number_of(cache), layer, window)


@opaque_op("pwmixed::attend_int")
def attend_int(query: Tensor, keys: Tensor, layer: int, cache: int, window: int = 0) -> Tensor:
    return _attend(query, keys * number_of(cache), layer, window)


@opaque_op("pwmixed::experts_layer")
def experts_layer(x: Tensor, logits: Tensor, layer: LayerNameType) -> Tensor:
    return x * logits.softmax(-1)[:, :1] * number_of(resolve(layer))


@opaque_op("pwmixed::experts_str")
def experts_str(x: Tensor, logits: Tensor, layer: str) -> Tensor:
    return x * logits.softmax(-1)[:, :1] * number_of(layer)


@opaque_op("pwmixed::experts_int")
def experts_int(x: Tensor, logits: Tensor, layer: int) -> Tensor:
    return x * logits.softmax(-1)[:, :1] * number_of(layer)


ATTEND = {"LayerName": attend_layer, "str": attend_str, "int": attend_int}
EXPERTS = {"LayerName": experts_layer, "str": experts_str, "int": experts_int}
for _op in ATTEND.values():
    _op.fake(lambda query, *_args, **_kwargs: torch.empty_like(query))
for _op in EXPERTS.values():
    _op.fake(lambda x, *_args, **_kwargs: torch.empty_like(x))


class Attention(nn.Module):
    """Norm and projections, then the operator; a layer that shares another one's cache has no projection for keys."""

    def __init__(self, kind: str, name: Any, *, cache: Any = None, window: int = 0) -> None:
        super().__init__()
        self.norm, self.query = nn.LayerNorm(8), nn.Linear(8, 8)
        self.keys = nn.Linear(8, 4) if cache is None else None
        self.attend = ATTEND[kind]
        self.layer, self.cache, self.window = name, name if cache is None else cache, window

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        query = self.query(x)
        keys = query if self.keys is None else self.keys(x)
        return self.attend(query, keys, self.layer, self.cache, self.window)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


class Experts(nn.Module):
    def __init__(self, kind: str, name: Any) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(8), nn.Linear(8, 4)
        self.experts = EXPERTS[kind]
        self.layer = name

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.experts(x, self.router(x), self.layer)


class Layer(nn.Module):
    def __init__(self, attention: Attention, mlp: nn.Module, *, scale: float = 1.0) -> None:
        super().__init__()
        self.attention, self.mlp, self.scale = attention, mlp, scale

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x) * self.scale
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def name(kind: str, index: int) -> Any:
    return {"LayerName": LayerName(f"layers.{index}"), "str": f"layers.{index}", "int": index + 1}[kind]


def check(module: nn.Module, *, pieces: int, unique: int, traced: int) -> None:
    options = CompileOptions(backend=BackendName.EAGER)
    torch.manual_seed(0)
    bundle = piecework.compile(module, (torch.randn(3, 8),), dynamic={"rows": Dim(1, 64)}, options=options)
    counts = bundle.record().counts
    model = piecework.load(bundle, weights=module)
    for rows in (1, 7):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            assert torch.allclose(model(x), module(x), rtol=1e-4, atol=1e-4)
    assert (counts["pieces"], counts["unique_pieces"]) == (pieces, unique)
    assert counts["blocks_traced"] == traced


@pytest.mark.parametrize(("kind", "layers"), one_in(2, KINDS, [3, 12]))
def test_equal_layers(kind: str, layers: int) -> None:
    """A | D A | D A | … | D: three, however deep."""
    module = Model([Layer(Attention(kind, name(kind, i)), Dense()) for i in range(layers)])
    check(module, pieces=layers + 1, unique=3, traced=1)


@pytest.mark.parametrize("kind", slow_but(KINDS, "LayerName"))
def test_dense_layers_then_experts(kind: str) -> None:
    """A | D A | D A | D A | R | M A | R | M A | R | M: five different ones."""
    layers = [Layer(Attention(kind, name(kind, i)), Dense()) for i in range(3)]
    layers += [Layer(Attention(kind, name(kind, i)), Experts(kind, name(kind, i))) for i in range(3, 6)]
    check(Model(layers), pieces=10, unique=5, traced=2)


@pytest.mark.parametrize("kind", slow_but(KINDS, "str"))
def test_alternating_windows(kind: str) -> None:
    """A | D A | D A | D A | D A | D A | D: the window is the operator's, so it makes no piece another one."""
    module = Model([Layer(Attention(kind, name(kind, i), window=(0, 12)[i % 2]), Dense()) for i in range(6)])
    check(module, pieces=7, unique=3, traced=1)


@pytest.mark.parametrize("kind", slow_but(KINDS, "int"))
def test_alternating_layers_that_compute_something_else(kind: str) -> None:
    """With d for a layer that scales: A | D A | d A | D A | d A | D A | d: four, for "A", "D A", "d A" and "d"."""
    module = Model([Layer(Attention(kind, name(kind, i)), Dense(), scale=(1.0, 0.5)[i % 2]) for i in range(6)])
    check(module, pieces=7, unique=4, traced=2)


@pytest.mark.parametrize("kind", slow_but(KINDS, "LayerName"))
def test_layers_that_share_a_cache(kind: str) -> None:
    """With a for a layer that has no keys of its own: A | D A | D A | D a | D a | D: four.

    The names of both caches, the layer's own and the one that it reads, are arguments of the operator.
    """
    names = [name(kind, i) for i in range(5)]
    layers = [Layer(Attention(kind, n), Dense()) for n in names[:3]]
    layers += [Layer(Attention(kind, n, cache=names[2]), Dense()) for n in names[3:]]
    check(Model(layers), pieces=6, unique=4, traced=2)
