"""Compilers and exporters take declared operators, with layers' handles, strings and mutated arguments."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from piecework import LayerName, LayerNameType, opaque_op


@opaque_op("ops_traced_test::update", mutates=("cache",))
def update(x: Tensor, cache: Tensor, layer: LayerNameType, eps: float = 1e-6) -> Tensor:
    cache.add_(x)
    return x * 2 + len(str(layer)) + eps


@update.fake
def _(x, cache, layer, eps=1e-6):
    return torch.empty_like(x)


@opaque_op("ops_traced_test::scale_by_name", cuda_graph_safe=True)
def scale_by_name(x: Tensor, layer: str, index: int = 3) -> tuple[Tensor, Tensor]:
    return x * len(layer), x.sum(0) + index


@scale_by_name.fake
def _(x, layer, index=3):
    return torch.empty_like(x), x.new_empty(x.shape[1:])


@opaque_op("ops_traced_test::write", mutates=("cache",))
def write(cache: Tensor, x: Tensor) -> None:
    cache.copy_(x)


class Block(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = LayerName(name)
        self.register_buffer("cache", torch.zeros(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return update(x, self.cache, self.layer).relu()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_torch_compile_takes_it_whole(x: Tensor) -> None:
    torch._dynamo.reset()
    blocks = nn.Sequential(*[Block("a" * (i + 1)) for i in range(3)])
    expected = copy.deepcopy(blocks)(x)
    assert torch.equal(torch.compile(blocks, backend="eager", fullgraph=True)(x), expected)
    for block, name in zip(blocks, ("a", "aa", "aaa"), strict=True):
        assert block.cache.abs().sum() > 0, name


@torch.no_grad()
def test_blocks_that_are_compiled_one_by_one_share_a_graph(x: Tensor) -> None:
    torch._dynamo.reset()
    blocks = nn.Sequential(*[Block("a" * (i + 1)) for i in range(3)])
    expected = copy.deepcopy(blocks)(x)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    assert torch.equal(blocks(x), expected)
    assert len(graphs) == 1


@torch.no_grad()
def test_torch_compile_takes_strings_and_tuples(x: Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: scale_by_name(x, "four", index=1), backend="eager", fullgraph=True)
    for got, expected in zip(compiled(x), scale_by_name(x, "four", index=1), strict=True):
        assert torch.equal(got, expected)


@torch.no_grad()
def test_torch_compile_keeps_an_operator_that_only_writes(x: Tensor) -> None:
    torch._dynamo.reset()
    cache = torch.zeros(4, 3)
    torch.compile(lambda cache, x: write(cache, x), backend="aot_eager", fullgraph=True)(cache, x)
    assert torch.equal(cache, x)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch.export takes modules' objects from torch 2.13")
@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_keeps_it(x: Tensor, strict: bool) -> None:
    torch._dynamo.reset()
    block = Block("abc")
    expected = copy.deepcopy(block)(x)
    exported = torch.export.export(block, (x,), strict=strict)
    assert update.overload in [n.target for n in exported.graph.nodes]
    assert torch.equal(exported.module()(x), expected)


def test_fake_tensors_need_no_layer(x: Tensor) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        out = update(fake, torch.empty_like(fake), LayerName("a"))
    assert out.shape == (4, 3)


_DEGRADED = """
import torch
from torch import Tensor
from piecework import LayerName, LayerNameType, opaque_op

assert LayerNameType is str

@opaque_op("degraded::add_length")
def add_length(x: Tensor, layer: LayerNameType) -> Tensor:
    return x + len(layer)

@add_length.fake
def _(x, layer):
    return torch.empty_like(x)

assert add_length.layer_parameters == ("layer",)
x, layer = torch.zeros(2), LayerName("abc")
with torch.no_grad():
    assert add_length(x, layer).tolist() == [3.0, 3.0]
    assert add_length.check(x, layer).tolist() == [3.0, 3.0]
    whole = torch.__version__ >= "2.12"  # before that, Dynamo ends its graph at a string of a class of one's own
    compiled = torch.compile(lambda x: add_length(x, layer), backend="eager", fullgraph=whole)
    assert compiled(x).tolist() == [3.0, 3.0]
"""


@pytest.mark.slow
def test_with_layer_names_as_strings() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DEGRADED],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIECEWORK_LAYERNAME": "0"},
    )
    assert done.returncode == 0, done.stderr
