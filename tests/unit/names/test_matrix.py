"""A layer's name costs nothing: every operator, each type of name, each way of compiling, 1 to 80 layers.

Pieces run operator by operator here, so that cells are quick; tests/compile/test_names.py has native ones. Each cell
runs two forwards of different lengths and compares results and the layers' states with those of eager mode. What is
counted by hand:

A stack of L blocks `x + after(op(before(x)))` is cut at L operators, which makes L + 1 pieces: the first block's part
before its operator; L - 1 times what is between two operators (one block's end, the next one's beginning); the last
block's part after its operator. So there are 3 different ones, or 2 where L is 1 and there is none between. The KV
update doesn't change that: it is a step directly before attention's, with nothing between them. A block by itself has a
part before its operator and one after it, so 2.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import piecework
from piecework.bundle.record import Recorder
from piecework.capture.request import Dim
from piecework.ops.ir.forward_context import ForwardContext
from piecework.ops.ir.layer import IS_OBJECT
from piecework.spec.compile_options import BackendName, CompileOptions
from tests.choice import slow_but
from tests.unit.names.kinds import KINDS
from tests.unit.names.models import FAMILIES, HIDDEN, Stack, forwards, make_stack, make_states

EAGER = CompileOptions(backend=BackendName.EAGER)
TOKENS = {"tokens": Dim(1, 64)}
WHOLE_STACK = {1: 2, 4: 3, 80: 3}
"""Artifacts of a stack, by its number of layers."""
ONE_BLOCK = 2
"""Artifacts of a block that is compiled by itself."""


def every_cell(*, deep: Sequence[tuple[str, str]] = (), depths: Iterable[int] = WHOLE_STACK) -> pytest.MarkDecorator:
    """Return every operator, type of name and depth, 80 layers with one type each; most are slow.

    Those with 4 layers of a few aren't, nor the first in `deep`, with 80. Dynamo takes 2 to 4 seconds for 80 layers,
    and 5 to 10 where it traces every block; torch.export more than 20. So with Dynamo, 80 layers are those in `deep`.
    """
    kept = [(family, kind, 4) for family, kind in itertools.product(FAMILIES, KINDS) if _one_kind_each(family, kind)]
    kept += [(family, kind, 80) for family, kind in deep[:1] if 80 in depths]
    cells = [*itertools.product(FAMILIES, KINDS, depths), *((family, kind, 80) for family, kind in deep)]
    cells = [cell for cell in cells if cell in kept or cell[2] < 80 or _one_kind_each(*cell[:2])]
    cells = slow_but(dict.fromkeys(cells), *kept)
    return pytest.mark.parametrize(("family", "kind", "num_layers"), cells)


def _one_kind_each(family: str, kind: str) -> bool:
    """Whether it is one of each operator's cells, or one of the KV update's, which has two operators."""
    number = list(FAMILIES).index(family)
    return family == "KV update" or kind == list(KINDS)[number % len(KINDS)]


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # 80 layers of tiny kernels: threads would wait for each other only
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
    torch.set_num_threads(num_threads)


@dataclasses.dataclass
class Cell:
    """An operator, a type of name, and a number of layers; the module, and what it gives in eager mode."""

    family: str
    kind: str
    num_layers: int

    def __post_init__(self) -> None:
        self.model: Stack = make_stack(self.family, self.kind, num_layers=self.num_layers)
        self._wanted = self._run(self.model)

    def check(self, run: Callable[[Tensor], Tensor]) -> None:
        """Compare results and the layers' states with those of eager mode, from the same states on."""
        outs, tensors = self._run(run)
        for got, want in zip((*outs, *tensors), (*self._wanted[0], *self._wanted[1]), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def _run(self, run: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        states = make_states(self.family, num_layers=self.num_layers)
        context = ForwardContext({KINDS[self.kind](index): state for index, state in enumerate(states)})
        outs = []
        for batch, x in forwards():
            with context.running(batch):
                outs.append(run(x))
        found = [value for state in states for value in vars(state).values() if isinstance(value, Tensor)]
        return outs, found


def counts(recorder: Recorder) -> dict[str, int]:
    """Return what was counted; what is compiled are pieces here, without the bodies of what our expert op calls."""
    found = {"store_hits": 0, "traced_again": 0, **recorder.finish().counts}
    return {**found, "compiled": found["compiled"] - found["natives"]}


def check_bundle(cell: Cell, module: nn.Module) -> None:
    x = torch.randn(5, HIDDEN)
    loaded = piecework.load(piecework.compile(module, (x,), dynamic=TOKENS, options=EAGER), weights=module)
    cell.check(loaded)
    assert len(loaded.plan.instances) == cell.num_layers + 1
    assert len(loaded.plan.pieces) == WHOLE_STACK[cell.num_layers]
    assert len({form.artifact for piece in loaded.plan.pieces for form in piece.ranges}) == WHOLE_STACK[cell.num_layers]


def export(cell: Cell) -> torch.export.ExportedProgram:
    tokens = torch.export.Dim("tokens", min=1, max=64)
    return torch.export.export(cell.model, (torch.randn(5, HIDDEN),), dynamic_shapes=({0: tokens},))


@every_cell(deep=[("KV update", kind) for kind in KINDS])
def test_a_bundle(family: str, kind: str, num_layers: int) -> None:
    cell = Cell(family, kind, num_layers)
    check_bundle(cell, cell.model)


@every_cell(deep=[("attention", "LayerName")], depths=(1, 4))
def test_torch_compile_of_the_whole_model(family: str, kind: str, num_layers: int) -> None:
    cell, recorder = Cell(family, kind, num_layers), Recorder()
    options = {"backend": "eager", "store": False, "recorder": recorder}
    cell.check(torch.compile(cell.model, backend="piecework", options=options, dynamic=True, fullgraph=True))
    found = counts(recorder)
    assert found["graphs"] == 1
    assert found["pieces"] == num_layers + 1
    assert (found["compiled"], found["store_hits"]) == (WHOLE_STACK[num_layers], 0)


@every_cell(deep=[("attention", "LayerName")], depths=(1, 4))
def test_each_block_compiled_by_itself(family: str, kind: str, num_layers: int) -> None:
    cell, recorder = Cell(family, kind, num_layers), Recorder()
    options = {"backend": "eager", "store": False, "recorder": recorder}
    for block in cell.model.blocks:
        block.compile(backend="piecework", options=options, dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=num_layers + 1):
        cell.check(cell.model)
    found = counts(recorder)
    # Dynamo guards plain names by their value, so that it traces every block; a LayerName by its type only
    traced = 1 if kind == "LayerName" and IS_OBJECT else num_layers
    assert found["graphs"] == traced
    assert found["traced_again"] == traced - 1
    assert any("LayerName" in note for note in recorder.finish().notes) == (traced >= 4)
    assert found["pieces"] == traced * ONE_BLOCK
    assert (found["compiled"], found["store_hits"]) == (ONE_BLOCK, ONE_BLOCK * (traced - 1))


@every_cell(depths=(1, 4))
def test_what_torch_export_makes(family: str, kind: str, num_layers: int) -> None:
    needs_exported_objects(kind)
    cell = Cell(family, kind, num_layers)
    exported = export(cell).module()
    cell.check(exported)
    check_bundle(cell, Positional(exported))


def needs_exported_objects(kind: str) -> None:
    if kind == "LayerName" and torch.__version__ < "2.13":
        pytest.skip("torch.export takes modules' objects from torch 2.13")


class Positional(nn.Module):
    """Calls a module by position: a program of torch.export refuses other names of arguments than it was made with."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("kind", slow_but(KINDS, "LayerName"))
def test_what_torch_export_saves(kind: str, tmp_path: Path) -> None:
    needs_exported_objects(kind)
    cell = Cell("KV update", kind, num_layers=4)
    torch.export.save(export(cell), tmp_path / "model.pt2")
    cell.check(torch.export.load(tmp_path / "model.pt2").module())
