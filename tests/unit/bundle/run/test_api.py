"""`piecework.compile` and `piecework.load` with the eager backend: the loaded model does what the module does."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.capture.graphs import Encoder, Mlp, NamedBlock, Stack
from torch import Tensor, nn

import piecework
from piecework.capture.request import Dim
from piecework.errors import CaptureError, RequestError, ShapeContractError, WeightsError
from piecework.ops.ir.layer import LayerName
from piecework.spec.compile_options import BackendName, CompileOptions

EAGER = CompileOptions(backend=BackendName.EAGER)
ROWS = {"rows": Dim(1, 64)}
Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Result:
    total: Tensor
    parts: tuple[Tensor, ...]
    missing: Tensor | None = None


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIECEWORK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "home"


def loaded(module: nn.Module, *args: Any, weights: object = None, **options: Any) -> piecework.LoadedModel:
    bundle = piecework.compile(module, args, **{"dynamic": ROWS, "options": EAGER, **options})
    return piecework.load(bundle, weights=module if weights is None else weights)


class Forward(nn.Module):
    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.full((8,), 1.5))

    def forward(self, x: Any, y: Any = None, *, gain: float = 2.0, flag: bool = False) -> object:
        return self.function(self, x, y, gain, flag)


def test_an_mlp_over_its_whole_range() -> None:
    module = Mlp()
    model = loaded(module, torch.randn(3, 8))
    for rows in (1, 2, 17, 63, 64):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            assert torch.equal(model(x), module(x))


def test_an_encoder_over_its_whole_range() -> None:
    module = Encoder()
    model = loaded(module, torch.zeros(4, dtype=torch.int64))
    for rows in (1, 5, 64):
        ids = torch.randint(0, 32, (rows,))
        with torch.no_grad():
            assert torch.allclose(model(ids), module(ids), atol=1e-6)


@pytest.mark.parametrize("rows", [1, 9])
def test_opaque_ops_with_the_handles_of_their_layers(rows: int) -> None:
    module = Stack([NamedBlock(LayerName("x" * i)) for i in range(4)])
    model = loaded(module, torch.randn(3, 8), opaque=["pwgraph::by_layer"])
    x = torch.randn(rows, 8)
    with torch.no_grad():
        assert torch.equal(model(x), module(x))
    assert len(model.plan.pieces) == 1


def test_an_opaque_op_with_a_size_numbers_and_two_results() -> None:
    def function(m: Forward, x: Tensor, *_: object) -> Tensor:
        a, b = torch.ops.pwtest.two(x * m.scale, x.shape[0] * 2 + 1, 0.5)
        return a - b

    module = Forward(function)
    model = loaded(module, torch.randn(3, 8), opaque=[torch.ops.pwtest.two])
    for rows in (1, 6):
        x = torch.randn(rows, 8)
        assert torch.equal(model(x), module(x))


def test_one_of_two_results_unused() -> None:
    module = Forward(lambda m, x, *_: torch.ops.pwtest.two(x, 1, 0.5)[1] * 2)
    model = loaded(module, torch.randn(3, 8), opaque=[torch.ops.pwtest.two.default])
    assert torch.equal(model(torch.ones(2, 8)), torch.ones(2, 8))


def test_a_size_that_plans_cannot_write_is_refused_when_compiling() -> None:
    module = Forward(lambda m, x, *_: torch.ops.pwtest.two(x, x.shape[0] ** 10, 0.5)[0])
    with pytest.raises(CaptureError, match="rows"):
        loaded(module, torch.randn(3, 8), opaque=["pwtest::two"])


def test_states_live_between_calls() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.pwtest.count(self.seen, x * 2)

    model = loaded(Counter(), torch.zeros(3, 8), opaque=["pwtest::count"], states={"seen": (1,)})
    with pytest.raises(RequestError, match="make_states"):
        model(torch.zeros(3, 8))
    model.make_states({})
    assert [model(torch.zeros(n, 8))[0, 0].item() for n in (3, 4, 1)] == [3, 7, 8]
    model.make_states({})
    assert model(torch.zeros(2, 8))[0, 0].item() == 2


RESULTS: dict[str, Callable[..., object]] = {
    "tuple": lambda m, x, *_: (x + 1, x * m.scale),
    "list": lambda m, x, *_: [x + 1, [x]],
    "dict": lambda m, x, *_: {"a": x + 1, "b": {"c": x * 2, "n": 3, "s": "t", "none": None}},
    "named tuple": lambda m, x, *_: Pair(x + 1, (x, x + 1)),
    "dataclass": lambda m, x, *_: Result(x.sum(), (x, x + 1)),
    "the argument": lambda m, x, *_: x,
    "the same twice": lambda m, x, *_: (lambda y: (y, y))(x + 1),
    "constants": lambda m, x, *_: (x + 1, True, 1.5),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_have_the_modules_own_structure(name: str) -> None:
    module = Forward(RESULTS[name])
    model = loaded(module, torch.randn(3, 8))
    x = torch.randn(2, 8)
    made, wanted = model(x), module(x)
    assert type(made) is type(wanted)
    flat_made, flat_wanted = flat(made), flat(wanted)
    assert len(flat_made) == len(flat_wanted)
    for a, b in zip(flat_made, flat_wanted, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def flat(value: object) -> list[object]:
    if isinstance(value, (tuple, list)):
        return [y for x in value for y in flat(x)]
    if isinstance(value, dict):
        return [y for k, x in value.items() for y in (k, *flat(x))]
    return [y for x in vars(value).values() for y in flat(x)] if isinstance(value, Result) else [value]


def test_a_result_that_is_no_data_is_refused() -> None:
    with pytest.raises(CaptureError, match="generator"):
        loaded(Forward(lambda m, x, *_: (i for i in [x])), torch.randn(3, 8))


def test_nested_and_keyword_arguments() -> None:
    module = Forward(lambda m, x, y, gain, flag: x["a"] * gain + (x["b"][0] if flag else 0) + y)
    x, y = {"a": torch.randn(3, 8), "b": [torch.randn(3, 8)]}, torch.randn(3, 8)
    bundle = piecework.compile(module, (x,), {"y": y, "flag": True}, dynamic=ROWS, options=EAGER)
    model = piecework.load(bundle, weights=module)
    x, y = {"b": [torch.randn(7, 8)], "a": torch.randn(7, 8)}, torch.randn(7, 8)
    for made in (model(x, y, flag=True), model(x, y=y, gain=2.0, flag=True), model(flag=True, y=y, x=x)):
        assert torch.equal(made, module(x, y, flag=True))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((torch.ones(3, 8), torch.ones(3, 8)), {}),
        ((torch.ones(3, 8),), {"gain": 3.0}),
        ((torch.ones(3, 8),), {"gain": 2}),
        ((torch.ones(3, 8),), {"x": torch.ones(3, 8)}),
        ((torch.ones(3, 8),), {"other": 1}),
        ((torch.ones(3, 8), None, 2.0, False, 5), {}),
        ((torch.ones(3, 8, dtype=torch.float64),), {}),
    ],
)
def test_calls_unlike_the_example_are_refused(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    model = loaded(Forward(lambda m, x, y, gain, flag: x * gain), torch.ones(3, 8))
    with pytest.raises(RequestError):
        model(*args, **kwargs)


@pytest.mark.parametrize(
    "x", [torch.ones(65, 8), torch.ones(0, 8), torch.ones(3, 7), torch.ones(3, 8, 1), torch.ones(8), 3.0, [1.0]]
)
def test_shapes_outside_the_contract_are_refused(x: object) -> None:
    model = loaded(Mlp(), torch.ones(3, 8))
    with pytest.raises(ShapeContractError):
        model(x)


def test_inputs_that_disagree_about_a_size_are_refused() -> None:
    model = loaded(Forward(lambda m, x, y, *_: x + y), torch.ones(3, 8), torch.ones(3, 8))
    with pytest.raises(ShapeContractError, match="rows"):
        model(torch.ones(3, 8), torch.ones(4, 8))


def test_arguments_of_another_layout_give_the_same() -> None:
    module = Mlp()
    model = loaded(module, torch.ones(3, 8))
    x = torch.randn(8, 10).t()
    with torch.no_grad():
        assert torch.equal(model(x), module(x))
        assert torch.equal(model(x[::2]), module(x[::2]))


def test_a_strided_example_takes_contiguous_arguments() -> None:
    module = Forward(lambda m, x, *_: x * m.scale)
    model = loaded(module, torch.randn(8, 8).t(), dynamic={})
    assert model.plan.inputs[0].stride == (1, 8)
    x = torch.randn(8, 8)
    assert torch.equal(model(x), module(x))


def test_weights_of_any_stride_are_bound_right() -> None:
    module = Mlp()
    module.up.weight = nn.Parameter(torch.randn(8, 16).t())
    model = loaded(module, torch.ones(3, 8))
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert torch.allclose(model(x), module(x), atol=1e-6)


def test_weights_come_from_modules_dicts_and_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    module = Mlp()
    bundle = piecework.compile(module, (torch.ones(3, 8),), dynamic=ROWS, options=EAGER)
    state = {n: t.detach().contiguous() for n, t in module.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    x = torch.randn(5, 8)
    for weights in (module, state, tmp_path / "a.safetensors", [str(tmp_path / "a.safetensors")]):
        with torch.no_grad():
            assert torch.equal(piecework.load(bundle, weights=weights)(x), module(x))


def test_other_weights_give_other_results() -> None:
    module, other = Mlp(), Mlp()
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert torch.equal(loaded(module, torch.ones(3, 8), weights=other)(x), other(x))


def wrong_weights() -> dict[str, object]:
    state = Mlp().state_dict()
    return {
        "missing": {n: t for n, t in state.items() if n != "up.bias"},
        "shape": {**state, "up.bias": torch.ones(15)},
        "meta": {**state, "up.bias": torch.ones(16, device="meta")},
        "no file": "/nowhere/at.all",
        "no weights": 5,
    }


@pytest.mark.parametrize("name", wrong_weights())
def test_wrong_weights_are_refused(name: str) -> None:
    bundle = piecework.compile(Mlp(), (torch.ones(3, 8),), dynamic=ROWS, options=EAGER)
    with pytest.raises(WeightsError):
        piecework.load(bundle, weights=wrong_weights()[name])


def test_a_closed_model_refuses_calls() -> None:
    model = loaded(Mlp(), torch.ones(3, 8))
    model.close()
    with pytest.raises(RequestError, match="closed"):
        model(torch.ones(3, 8))


def test_run_wants_every_input_by_name() -> None:
    model = loaded(Mlp(), torch.ones(3, 8))
    assert model.plan_inputs == ("x",)
    assert model.run({"x": torch.ones(2, 8)})[0].shape == (2, 4)
    with pytest.raises(RequestError, match="x"):
        model.run({"y": torch.ones(2, 8)})


@pytest.mark.parametrize(
    "options",
    [
        {"dynamic": {"rows": Dim(1, 2)}},
        {"dynamic": {"rows": Dim(1, 9, axes={})}},
        {"dynamic": {"rows": Dim(1, 9, axes={"x": 5})}},
        {"dynamic": {"rows": Dim(1, 9, axes={"z": 0})}},
        {"dynamic": {"rows": Dim(1, 9), "other": Dim(1, 9)}},
        {"opaque": [object()]},
        {"states": {"nothing": (1,)}},
    ],
)
def test_wrong_declarations_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CaptureError):
        piecework.compile(Mlp(), (torch.ones(3, 8),), **{"dynamic": ROWS, "options": EAGER, **options})
    assert list(tmp_path.glob("piecework-*")) == []


def test_two_sizes_of_one_argument() -> None:
    module = Forward(lambda m, x, *_: (x @ x.transpose(1, 2)).softmax(-1) @ x)
    sizes = {"batch": Dim(1, 4, axes={"x": 0}), "length": Dim(1, 16, axes={"x": 1})}
    model = loaded(module, torch.randn(2, 5, 8), dynamic=sizes)
    for shape in ((1, 1, 8), (4, 16, 8), (1, 16, 8), (4, 1, 8)):
        x = torch.randn(shape)
        assert torch.allclose(model(x), module(x), atol=1e-6)
    with pytest.raises(ShapeContractError):
        model(torch.randn(5, 1, 8))


def test_ranges_keep_to_the_size_that_they_are_about() -> None:
    """Equal pieces over two sizes: an artifact for one row must not serve two columns."""

    def function(m: Forward, x: Tensor, y: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        a, _ = torch.ops.pwtest.two(torch.relu(x) * 3, 1, 0.5)
        return a, torch.relu(y) * 3

    module = Forward(function)
    sizes = {"rows": Dim(1, 64, axes={"x": 0}), "cols": Dim(1, 64, axes={"y": 0})}
    options = CompileOptions(backend=BackendName.EAGER, ranges=((1, 1), (2, 64)))
    model = loaded(module, torch.randn(3, 8), torch.randn(5, 8), dynamic=sizes, options=options, opaque=["pwtest::two"])
    assert [[(r.min, r.max) for r in p.ranges] for p in model.plan.pieces] == [[(1, 1), (2, 64)], [(1, 64)]]
    for rows, cols in ((1, 5), (5, 1), (2, 2)):
        x, y = torch.randn(rows, 8), torch.randn(cols, 8)
        assert all(torch.equal(a, b) for a, b in zip(model(x, y), module(x, y), strict=True))


def test_the_bundle_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    module = Mlp()
    for name in ("dir", "file.pwb"):
        bundle = piecework.compile(module, (torch.ones(3, 8),), dynamic=ROWS, options=EAGER, out=tmp_path / name)
        assert bundle.path == tmp_path / name
        moved = tmp_path / "elsewhere" / name
        moved.parent.mkdir(exist_ok=True)
        (tmp_path / name).rename(moved)
        x = torch.randn(2, 8)
        with torch.no_grad():
            assert torch.equal(piecework.load(moved, weights=module)(x), module(x))


def function(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("module", "dynamic", "said"),
    [
        (function, ROWS, "a torch.nn.Module"),
        (Mlp(), [Dim(1, 64)], "a mapping of names to sizes"),
        (Mlp(), {"rows": torch.export.Dim("rows", min=2, max=64)}, "piecework.Dim(2, 64)"),
        (Mlp(), {"rows": 3}, "piecework.Dim(1, 64)"),
    ],
)
def test_what_is_taken_for_something_else_is_our_error(module: Any, dynamic: Any, said: str) -> None:
    with pytest.raises(CaptureError) as caught:
        piecework.compile(module, (torch.randn(3, 8),), dynamic=dynamic, options=EAGER)
    assert said in caught.value.try_


@pytest.mark.parametrize(
    ("module", "example", "said"),
    [
        (torch.jit.script(nn.Linear(8, 8)), torch.randn(3, 8), "the module that it was made of"),
        (torch.compile(nn.Linear(8, 8)), torch.randn(3, 8), "_orig_mod"),
        (nn.Embedding(9, 8), torch.zeros(1, 5, dtype=torch.long), 'axes={"input": 1}) for its length'),
    ],
    ids=["scripted", "compiled", "tokens"],
)
def test_what_can_be_said_before_it_is_traced(module: Any, example: Tensor, said: str) -> None:
    with pytest.raises(CaptureError) as caught:
        piecework.compile(module, (example,), dynamic=ROWS, options=EAGER)
    assert said in caught.value.try_


class DynamicCache:
    """Named as transformers' is."""


def test_a_cache_in_the_result_has_its_own_words() -> None:
    module = Forward(lambda m, x, *_: (x, DynamicCache()))
    with pytest.raises(CaptureError) as caught:
        piecework.compile(module, (torch.randn(3, 8),), dynamic=ROWS, options=EAGER)
    assert "use_cache=False" in caught.value.try_


def test_a_cut_at_what_is_not_there_lists_what_is(tmp_path: Path) -> None:
    with pytest.raises(CaptureError) as caught:
        piecework.compile(Mlp(), (torch.randn(3, 8),), dynamic=ROWS, options=EAGER, opaque=["aten::relu", "no::such"])
    assert "no::such" in caught.value.asked
    assert "piecework::linear" in caught.value.try_


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_noted(training: bool, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8, track_running_stats=False)).train(
        training
    )
    bundle = piecework.compile(module, (torch.randn(3, 8),), dynamic={"rows": Dim(2, 64)}, options=EAGER)
    assert any("Dropout" in note and ".eval()" in note for note in bundle.record().notes) is training


@pytest.mark.parametrize("asked", [True, False])
def test_gradients_that_are_asked_for_are_said_not_to_be_there(asked: bool) -> None:
    x = torch.randn(3, 8, requires_grad=asked)
    bundle = piecework.compile(Mlp(), (x,), dynamic=ROWS, options=EAGER)
    assert any("requires gradients" in note for note in bundle.record().notes) is asked
    assert not piecework.load(bundle, weights=Mlp())(x).requires_grad


def test_channels_last_with_a_dynamic_batch() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    module = module.to(memory_format=torch.channels_last)

    def images(count: int) -> Tensor:
        return torch.randn(count, 3, 6, 6).to(memory_format=torch.channels_last)

    model = loaded(module, images(3))
    for count in (1, 2, 40):
        x = images(count)
        with torch.no_grad():
            torch.testing.assert_close(model(x), module(x))
            torch.testing.assert_close(model(x.contiguous()), module(x))


def test_sizes_that_depend_on_values_are_for_the_eager_backend() -> None:
    module = Forward(lambda m, x, *_: x[x > 0] * 2)
    x = torch.randn(3, 8)
    assert torch.equal(loaded(module, x)(x), module(x))
    with pytest.raises(CaptureError) as caught:
        piecework.compile(module, (x,), dynamic=ROWS)
    assert "depends on values" in caught.value.found
    assert "test_api.py" in caught.value.location


def test_a_number_read_from_a_tensor_is_our_error() -> None:
    module = Forward(lambda m, x, *_: x[int(x[0, 0])])
    with pytest.raises(CaptureError) as caught:
        piecework.compile(module, (torch.randn(3, 8),), dynamic=ROWS, options=EAGER)
    assert "depends on the values of a tensor" in caught.value.found
    assert "test_api.py" in caught.value.location
