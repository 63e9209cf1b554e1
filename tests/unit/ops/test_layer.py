"""LayerName: a value that modules hold, operators take and compilers lift."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piecework.ops.ir.layer as layer_module
from piecework.errors import OpError
from piecework.foundation.environment import child_variables
from piecework.ops.ir.layer import IS_OBJECT, LayerName, LayerNameType, encode, resolve
from tests.unit.integrations import named_ops


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


as_objects = pytest.mark.skipif(not IS_OBJECT, reason="layer names are strings here")
exports_objects = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch.export takes modules' objects from torch 2.13"
)


class Block(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.layer = LayerName(name)

    def forward(self, x: Tensor) -> Tensor:
        return named_ops.update["LayerName"](self.linear(x), self.layer) * 2


def stack(num_blocks: int = 4) -> nn.Sequential:
    return nn.Sequential(*(Block("n" * i) for i in range(num_blocks)))


def graphs_of(run: Any) -> tuple[Any, list[Any]]:
    graphs: list[Any] = []

    def backend(module: Any, _inputs: Any) -> Any:
        graphs.append(module)
        return module

    return run(backend), graphs


@as_objects
class TestValue:
    def test_equal_names_are_equal_and_hash_alike(self) -> None:
        assert LayerName("a") == LayerName("a") != LayerName("b")
        assert {LayerName("a"): 1}[LayerName("a")] == 1
        assert repr(LayerName("a")) == "LayerName('a')"
        assert LayerName("a") != "a"

    def test_it_cannot_be_changed(self) -> None:
        with pytest.raises(AttributeError):
            LayerName("a").value = "b"  # type: ignore[misc]

    def test_modules_that_hold_one_are_copied_and_pickled(self) -> None:
        block = Block("a.b")
        assert copy.deepcopy(block).layer == copy.copy(block).layer == block.layer
        assert pickle.loads(pickle.dumps(block)).layer == block.layer
        buffer = io.BytesIO()
        torch.save(block, buffer)
        buffer.seek(0)
        assert torch.load(buffer, weights_only=False).layer == block.layer

    def test_resolve_and_encode_are_inverse(self) -> None:
        assert resolve(encode("a")) == resolve("a") == "a"
        assert type(resolve(encode("a"))) is str
        assert isinstance(encode("a"), LayerNameType)

    def test_a_second_import_uses_the_same_class(self) -> None:
        before = LayerName("a")
        again = importlib.reload(layer_module)
        assert again.LayerName is LayerName
        assert again.LayerName("a") == before


class TestUnderTorch:
    def test_a_whole_model_gives_one_graph(self) -> None:
        model, x = stack(), torch.randn(3, 4)
        run, graphs = graphs_of(lambda b: torch.compile(model, backend=b, fullgraph=True))
        torch.testing.assert_close(run(x), model(x))
        assert len(graphs) == 1

    @as_objects
    def test_siblings_share_one_graph_and_keep_their_names(self) -> None:
        model, x = stack(), torch.randn(3, 4)
        wanted = model(x)

        def compile_blocks(backend: Any) -> Any:
            for block in model:
                block.compile(backend=backend, fullgraph=True)
            return model

        run, graphs = graphs_of(compile_blocks)
        torch.testing.assert_close(run(x), wanted)
        assert len(graphs) == 1

    @as_objects
    def test_another_name_later_is_seen_without_tracing_again(self) -> None:
        block, x = Block("n"), torch.randn(3, 4)
        run, graphs = graphs_of(lambda b: torch.compile(block, backend=b))
        run(x)
        block.layer = LayerName("nnnnn")
        torch.testing.assert_close(run(x), block(x))
        assert len(graphs) == 1

    @exports_objects
    @pytest.mark.parametrize("strict", [False, True])
    def test_export_and_its_file(self, strict: bool) -> None:
        model, x = stack(), torch.randn(3, 4)
        exported = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), model(x))
        buffer = io.BytesIO()
        torch.export.save(exported, buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.export.load(buffer).module()(x), model(x))

    @as_objects
    def test_a_fake_implementation_must_not_ask_for_the_name(self) -> None:
        block, x = AskingBlock("nn"), torch.randn(2, 2)
        assert block(x).shape == (2, 2)
        with pytest.raises(Exception, match="a graph that serves all layers"):
            torch.compile(block, backend="eager", fullgraph=True)(x)


@named_ops.opaque_op("pwtest::asking")
def asking(x: Tensor, layer: LayerNameType) -> Tensor:
    return x.clone()


@asking.fake
def _(x: Tensor, layer: LayerNameType) -> Tensor:
    return x.new_empty(len(resolve(layer)), *x.shape[1:])


class AskingBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return asking(x, self.layer)


@as_objects
def test_resolve_says_what_to_do_in_a_trace() -> None:
    from torch._library.fake_class_registry import maybe_to_fake_obj

    fake_mode = torch._subclasses.FakeTensorMode()
    with pytest.raises(OpError, match="`str` argument"):
        resolve(maybe_to_fake_obj(fake_mode, LayerName("a")))


_DEGRADED = """
import copy, pickle, torch
from piecework.ops.ir.layer import IS_OBJECT, LayerName, LayerNameType, resolve
from tests.unit.ops.test_layer import Block, stack
assert not IS_OBJECT and LayerNameType is str
assert isinstance(LayerName("a"), LayerName) and LayerName("a").value == "a" and resolve(LayerName("a")) == "a"
assert pickle.loads(pickle.dumps(Block("a"))).layer == copy.deepcopy(Block("a")).layer == "a"
torch.manual_seed(0)
torch.set_grad_enabled(False)
model, x = stack(), torch.ones(3, 4)
eager = model(x)
assert torch.equal(torch.export.export(model, (x,)).module()(x), eager)
whole = torch.__version__ >= "2.12"  # before that, Dynamo ends its graph at a string of a class of one's own
assert torch.equal(torch.compile(model, backend="eager", fullgraph=whole)(x), eager)
for block in model: block.compile(backend="eager", fullgraph=whole)
assert torch.equal(model(x), eager)
print(eager.sum().item())
"""


@pytest.mark.slow
def test_as_strings_the_results_are_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _DEGRADED],
        env=child_variables({"PIECEWORK_LAYERNAME": "0"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    assert float(done.stdout) == pytest.approx(stack()(torch.ones(3, 4)).sum().item())
