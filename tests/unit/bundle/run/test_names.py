"""Bundles whose opaque ops are told their layer by name: nothing to declare, one piece for all, results as in eager."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.capture.graphs import Stack
from tests.unit.capture.name_blocks import Block, stack
from tests.unit.capture.name_ops import NAMES, by_layer, by_number, by_text, library
from torch import Tensor, nn

import piecework
from piecework.bundle.plan import OpStep
from piecework.capture.request import Dim
from piecework.foundation.environment import child_variables
from piecework.ops.ir.layer import IS_OBJECT, LayerName
from piecework.spec.compile_options import BackendName, CompileOptions

EAGER = CompileOptions(backend=BackendName.EAGER)
ROWS = {"rows": Dim(1, 64)}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "home"


def loaded(module: nn.Module, *args: Any, **options: Any) -> piecework.LoadedModel:
    bundle = piecework.compile(module, args or (torch.randn(3, 8),), dynamic=ROWS, options=EAGER, **options)
    return piecework.load(bundle, weights=module)


def assert_equal_eager(model: piecework.LoadedModel, module: nn.Module) -> None:
    for rows in (1, 9, 64):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            assert torch.equal(model(x), module(x))


def constants(model: piecework.LoadedModel) -> list[dict[str, Any]]:
    steps = [s for s in model.plan.steps if isinstance(s, OpStep)]
    return [a for s in steps for a in s.args if "slot" not in a]


USES: dict[str, Any] = {
    "LayerName": lambda block, x: by_layer(x, block.name),
    "str": lambda block, x: by_text(x, block.name),
    "int": lambda block, x: by_number(x, block.name),
}


@pytest.mark.parametrize("layers", [1, 4, 80])
@pytest.mark.parametrize("kind", USES)
def test_one_piece_for_all_layers(kind: str, layers: int) -> None:
    module = stack(USES[kind], name=[NAMES[kind](i + 1) for i in range(layers)])
    model = loaded(module)
    assert_equal_eager(model, module)
    assert len(model.plan.pieces) == 1
    assert model.plan.pieces[0].num_ops == 2
    written = "layer" if kind == "LayerName" and IS_OBJECT else "const"
    plain = [f"layers.{i + 1}" if kind != "int" else i + 1 for i in range(layers)]
    assert constants(model) == [{written: name} for name in plain]


@pytest.mark.parametrize("kind", USES)
def test_the_record_counts_blocks_and_pieces(kind: str) -> None:
    module = stack(USES[kind], name=[NAMES[kind](i + 1) for i in range(6)])
    bundle = piecework.compile(module, (torch.randn(3, 8),), dynamic=ROWS, options=EAGER)
    counts = bundle.record().counts
    assert (counts["blocks_traced"], counts["blocks_stamped"]) == (1, 5)
    assert (counts["pieces"], counts["unique_pieces"]) == (6, 1)


def test_a_block_that_looks_at_its_name_gets_what_it_asks_for() -> None:
    def use(block: Any, x: Tensor) -> Tensor:
        return by_text(x * 2 if block.name == "b" else x, block.name)

    module = stack(use, name=list("abc"))
    bundle = piecework.compile(module, (torch.randn(3, 8),), dynamic=ROWS, options=EAGER)
    assert bundle.record().counts["blocks_traced"] == 2
    assert_equal_eager(piecework.load(bundle, weights=module), module)


def test_one_name_is_one_object_in_the_loaded_model() -> None:
    seen: list[Any] = []

    def use(block: Any, x: Tensor) -> Tensor:
        return by_layer(by_layer(x, block.name), block.other)

    shared = LayerName("shared")
    model = loaded(stack(use, name=[LayerName("a"), LayerName("b")], other=[shared, shared]))
    original = by_layer.function
    try:
        by_layer.function = lambda x, layer: seen.append(layer) or original(x, layer)
        again = piecework.LoadedModel(model.plan, forms=model._forms, constants=model._constants, record=model.record)
        again(torch.randn(2, 8))
    finally:
        by_layer.function = original
    assert seen == [LayerName("a"), shared, LayerName("b"), shared]
    assert seen[1] is seen[3] or not IS_OBJECT
    assert all(type(n) is LayerName for n in seen) or not IS_OBJECT


library.define("cast(Tensor x, ScalarType dtype, float limit, SymInt[] shape) -> Tensor")
library.impl(
    "cast", lambda x, dtype, limit, shape: x.clamp(max=limit).to(dtype).reshape(shape), "CompositeExplicitAutograd"
)
torch.library.register_fake(
    "pwgraph::cast", lambda x, dtype, limit, shape: x.new_empty(shape, dtype=dtype), lib=library
)


def test_operators_that_take_types_sizes_and_infinities() -> None:
    def use(block: Any, x: Tensor) -> Tensor:
        wide = torch.ops.pwgraph.cast(x, torch.float64, float("inf"), [x.shape[0], 2, 4])
        return torch.ops.pwgraph.cast(wide, torch.float32, 2.5, [x.shape[0], 8])

    module = Stack([Block(use), Block(use)])
    model = loaded(module)
    assert_equal_eager(model, module)


@pytest.mark.slow
def test_layer_names_that_are_strings(tmp_path: Path) -> None:
    """`PIECEWORK_LAYERNAME=0`, as in a torch that takes no objects: the same, with constants for names."""
    program = """
import sys, torch, piecework
from piecework.ops.ir.layer import IS_OBJECT, LayerName
from tests.unit.capture.name_blocks import stack
from tests.unit.capture.name_ops import by_layer
assert not IS_OBJECT and isinstance(LayerName("a"), str)
module = stack(lambda block, x: by_layer(x, block.name), name=[LayerName(f"layers.{i}") for i in range(5)])
options = piecework.CompileOptions(backend=piecework.BackendName.EAGER)
bundle = piecework.compile(
    module, (torch.randn(3, 8),), dynamic={"rows": piecework.Dim(1, 64)}, options=options, out=sys.argv[1]
)
counts = bundle.record().counts
assert counts["unique_pieces"] == 1, counts
assert (counts["blocks_traced"], counts["blocks_stamped"]) == (1, 4), counts
model = piecework.load(bundle, weights=module)
x = torch.randn(4, 8)
with torch.no_grad():
    assert torch.equal(model(x), module(x))
"""
    root = Path(__file__).parents[4]
    variables = child_variables({"PIECEWORK_LAYERNAME": "0", "PYTHONPATH": f"{root / 'src'}:{root}"})
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "bundle")],
        env=variables,
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model = piecework.load(tmp_path / "bundle", weights=stack(USES["LayerName"], name=[LayerName("a")] * 5))
    assert model(torch.randn(2, 8)).shape == (2, 8)
