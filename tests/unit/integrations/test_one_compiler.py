"""`torch.compile(backend="piecework")` and `piecework.compile` are one compiler: pieces, writes, weights, sizes."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.bundle.record import Recorder
from piecework.bundle.run.model import LoadedModel
from piecework.spec.compile_options import BackendName, CompileOptions

EAGER = CompileOptions(backend=BackendName.EAGER)

library = torch.library.Library("pwalias", "DEF")
library.define("rotate(Tensor(a!) q, Tensor(b!)? k, Tensor cos, str name) -> ()")
library.define("attend(Tensor q, Tensor k, Tensor(a!) cache, Tensor(b!) out, int layer) -> ()")
library.define("bump(Tensor(a!) x) -> Tensor(a!)")


def _rotate(q: Tensor, k: Tensor | None, cos: Tensor, name: str) -> None:
    q.mul_(cos)
    if k is not None:
        k.add_(len(name))


def _attend(q: Tensor, k: Tensor, cache: Tensor, out: Tensor, layer: int) -> None:
    cache[layer] += k.sum(0)
    out.copy_(q * cache[layer])


def _bump(x: Tensor) -> Tensor:
    return x.add_(1)


for _name, _function in (("rotate", _rotate), ("attend", _attend), ("bump", _bump)):
    library.impl(_name, _function, "CPU")
library.impl("rotate", lambda q, k, cos, name: None, "Meta")
library.impl("attend", lambda q, k, cache, out, layer: None, "Meta")
library.impl("bump", lambda x: x, "Meta")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, new_home: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PIECEWORK_HOME", str(new_home(tmp_path / "home")))
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(module: Any, recorder: Recorder | None = None, **kwargs: Any) -> Any:
    options = {"backend": "eager", "recorder": recorder or Recorder()}
    return torch.compile(module, backend="piecework", options=options, **kwargs)


class Block(nn.Module):
    """A norm, a gated MLP, and an opaque operator in the middle, as vLLM's layers have theirs."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.norm, self.qk, self.out = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 8)
        self.register_buffer("cos", torch.rand(4, 2), persistent=False)
        self.layer = layer

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        q, k = self.qk(self.norm(x)).split([8, 8], dim=-1)
        torch.ops.pwalias.rotate(q.view(-1, 4, 2), k, self.cos, f"layers.{self.layer}")
        out = torch.empty_like(q)
        torch.ops.pwalias.attend(q, k, cache, out, self.layer)
        return x + self.out(out)


class Stack(nn.Module):
    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i) for i in range(num_blocks))

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, cache)
        return x


def mlp() -> nn.Module:
    blocks = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)) for _ in range(3)]
    return nn.Sequential(*blocks).requires_grad_(False)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bundle_first", [False, True])
def test_what_one_way_compiled_the_other_finds(dynamic: bool, bundle_first: bool) -> None:
    model, recorder = mlp(), Recorder()
    x = torch.randn(5, 8)
    sizes = {"rows": piecework.Dim(2, 64)} if dynamic else None
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
    if bundle_first:
        piecework.compile(model, (x,), dynamic=sizes, options=EAGER)
        torch.testing.assert_close(compiled(model, recorder)(x), model(x))
        assert (recorder.finish().counts["compiled"], recorder.finish().counts["store_hits"]) == (0, 1)
    else:
        compiled(model)(x)
        bundle = piecework.compile(model, (x,), dynamic=sizes, options=EAGER)
        assert (bundle.record().counts["compiled"], bundle.record().counts["store_hits"]) == (0, 1)


def test_operators_with_alias_annotations_write_to_views_and_caches() -> None:
    model, recorder = Stack(4), Recorder()
    run = compiled(model, recorder, dynamic=True, fullgraph=True)
    for size in (3, 5):
        x = torch.randn(size, 8)
        mine, theirs = torch.ones(4, 8), torch.ones(4, 8)
        torch.testing.assert_close(run(x, mine), model(x, theirs))
        torch.testing.assert_close(mine, theirs)
    counts = recorder.finish().counts
    assert counts["graphs"] == 1
    # before the first rotation; between a rotation and the attention, where `out` is made; between two layers; the end
    assert counts["compiled"] < counts["pieces"]


def test_such_operators_in_a_bundle() -> None:
    model, x = Stack(2), torch.randn(5, 8)
    mine, theirs = torch.ones(2, 8), torch.ones(2, 8)
    sizes = {"tokens": piecework.Dim(1, 64, axes={"x": 0})}
    loaded = piecework.load(piecework.compile(model, (x, mine), dynamic=sizes, options=EAGER), weights=model)
    torch.testing.assert_close(loaded(x, mine), model(x, theirs))
    torch.testing.assert_close(mine, theirs)
    with pytest.raises(piecework.RequestError, match="writes to"):
        loaded(x, torch.ones(8, 2).t())


def test_writes_keep_their_order_and_views_see_them() -> None:
    def forward(x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        row = cache[1]
        before = row * 2
        torch.ops.pwalias.bump(cache[1:])
        after = row * 2
        row.mul_(3)
        h = x * 2
        part = h[1:]
        h.add_(1)  # the forward's own: no step
        again = torch.ops.pwalias.bump(part)
        return before, after, row + 0, h, part, again * cache[1], cache.t()

    x = torch.randn(3, 4)
    mine, theirs = torch.rand(3, 4), torch.zeros(3, 4)
    theirs.copy_(mine)
    got, want = compiled(forward, dynamic=True)(x, mine), forward(x, theirs)
    for a, b in zip([*got, mine], [*want, theirs], strict=True):
        torch.testing.assert_close(a, b)
    got[-1].zero_()
    assert not mine.any()  # a result that is a view of an input is one here too


def test_caches_and_counters_that_are_buffers() -> None:
    class Static(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(4, 8))
            self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            self.cache.index_copy_(0, position, self.linear(x))
            self.seen.add_(x.shape[0])
            return self.cache.sum(0) + self.seen

    mine, theirs = Static(), Static()
    theirs.load_state_dict(mine.state_dict())
    run = compiled(mine, fullgraph=True)
    for position in (0, 2):
        x, at = torch.randn(1, 8), torch.tensor([position])
        torch.testing.assert_close(run(x, at), theirs(x, at))
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict())


def test_weights_are_those_of_the_call() -> None:
    model = mlp()
    run, x = compiled(model), torch.randn(3, 8)
    run(x)
    changes = (
        lambda: model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()}),
        lambda: setattr(model[0][1].weight, "data", torch.randn(16, 8)),
        lambda: setattr(model[1], "1", nn.Linear(8, 16).requires_grad_(False)),
        lambda: model[2][1].weight.data.add_(torch.randn(16, 8)),
    )
    for change in changes:
        change()
        torch.testing.assert_close(run(x), model(x))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def loaded_models() -> int:
    gc.collect()
    return sum(type(found) is LoadedModel for found in gc.get_objects())


def test_what_is_bound_ends_with_its_weights_and_with_a_reset() -> None:
    before = loaded_models()
    blocks, x = [Wrapped() for _ in range(2)], torch.randn(3, 8)
    for block in blocks:
        block.compile(backend="piecework", options={"backend": "eager"}, dynamic=False)
        block(x)
    assert loaded_models() == before + 2
    del blocks[0], block
    assert loaded_models() == before + 1
    torch._dynamo.reset()
    assert loaded_models() == before


def test_a_size_that_the_trace_narrows_is_guarded_and_other_sizes_are_compiled_when_they_come() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] % 2:
                return x + 1
            return x.view(2, x.shape[0] // 2, 4).sum(0) + self.embedding.weight[: x.shape[0] // 2]

    model, recorder = Positions(), Recorder()
    run = compiled(model, recorder, dynamic=True)
    for size in (4, 8, 5, 7, 16):
        x = torch.randn(size, 4)
        torch.testing.assert_close(run(x), model(x))
    assert not recorder.finish().notes


def test_an_unmodified_bert() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    model, recorder = BertModel(config).eval(), Recorder()
    run = compiled(model, recorder, dynamic=True)
    for batch, length in ((2, 7), (1, 9), (3, 5)):
        ids, mask = torch.randint(0, 50, (batch, length)), torch.ones(batch, length, dtype=torch.int64)
        mask[:, -1] = 0
        torch.testing.assert_close(run(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)
    assert not recorder.finish().notes
    assert recorder.finish().counts["graphs"] == 2  # Dynamo traces a batch of one by itself


def test_what_is_left_to_inductor_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    recorder = Recorder()
    run = compiled(forward, recorder, dynamic=False)
    with caplog.at_level(logging.WARNING, logger="piecework"):
        for size in (2, 3):
            run(torch.ones(size, size))
    told = [record.getMessage() for record in caplog.records if record.name == "piecework"]
    assert told == ["a graph is left to Inductor whole: it enters or leaves a mode"]
    assert recorder.finish().notes == (told[0], told[0])
