"""The shape contract, what can't be captured, and what is captured right although it is written in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from piecework.capture.capture import InputKind, capture
from piecework.capture.request import Dim, TensorInput
from piecework.errors import CaptureError, ShapeContractError
from piecework.foundation.process import garbage_collection_off
from tests.unit.capture.graphs import COUNT, Mlp, Stack, listing, request


class Forward(nn.Module):
    """A function as a module with a parameter, buffers and a plain tensor."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("kept", torch.zeros(8))
        self.register_buffer("computed", torch.arange(8.0), persistent=False)
        self.plain = torch.full((8,), 3.0)

    def forward(self, *args: Tensor) -> object:
        return self.function(self, *args)


def branch(m: Forward, x: Tensor) -> Tensor:
    if x.shape[0] > 16:
        return x * 2
    return x


def one_is_special(m: Forward, x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] == 1 else x


def last_is_special(m: Forward, x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] == 64 else x


def to_int(m: Forward, x: Tensor) -> Tensor:
    return x * int(x.shape[0])


def parity(m: Forward, x: Tensor) -> Tensor:
    return x.view(2, -1) if x.shape[0] % 2 == 0 else x


@pytest.mark.parametrize("function", [branch, one_is_special, last_is_special, to_int, parity])
def test_what_holds_for_a_part_of_the_range_names_its_line(function: Callable[..., object]) -> None:
    with pytest.raises(ShapeContractError) as caught:
        capture(request(Forward(function)))
    lines, start = inspect.getsourcelines(function)
    file, _, line = caught.value.location.rpartition(":")
    assert file == __file__
    assert start <= int(line) < start + len(lines)
    assert "rows" in str(caught.value)


def test_two_sizes_that_must_be_equal_are_a_narrowing() -> None:
    wanted = request(Forward(lambda m, x, y: x + y), ("a", 8), ("b", 8), sizes={"a": Dim(1, 9), "b": Dim(1, 9)})
    with pytest.raises(ShapeContractError, match=r"Eq\((a, b|b, a)\)"):
        capture(wanted)


@pytest.mark.parametrize(
    ("function", "bounds"),
    [
        (branch, (17, 64)),
        (branch, (1, 16)),
        (one_is_special, (2, 64)),
        (one_is_special, (1, 1)),
        (last_is_special, (1, 63)),
        (to_int, (5, 5)),
    ],
)
def test_a_condition_that_holds_for_the_whole_range_is_none(
    function: Callable[..., object], bounds: tuple[int, int]
) -> None:
    made = capture(request(Forward(function), sizes={"rows": Dim(*bounds)}))
    doubled = [n for n in made.graph.nodes if str(n.target) == "aten.mul.Tensor" and n.args[1] == 2]
    assert bool(doubled) == (bounds in {(17, 64), (1, 1)})


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.t().contiguous().t() + 1,
        lambda m, x: x.view(x.shape[0], 2, 4).transpose(0, 1).reshape(2, -1),
        lambda m, x: x.view(x.shape[0], 2, 4).transpose(0, 1) @ x.view(x.shape[0], 2, 4).permute(1, 2, 0),
        lambda m, x: torch.einsum("id,jd->ij", x, x),
        lambda m, x: x - x.mean(0, keepdim=True),
        lambda m, x: x[1:],
        lambda m, x: x / x.shape[0],
        lambda m, x: x + torch.arange(x.shape[0])[:, None],
    ],
)
@pytest.mark.parametrize("low", [0, 1])
def test_ordinary_layout_changes_narrow_nothing(function: Callable[..., object], low: int) -> None:
    made = capture(request(Forward(function), sizes={"rows": Dim(low, 64)}))
    assert set(made.size_names.values()) == {"rows"}


def item_branch(m: Forward, x: Tensor) -> Tensor:
    return x * 2 if x.sum().item() > 0 else x


def bool_branch(m: Forward, x: Tensor) -> Tensor:
    if (x > 0).all():
        return x
    return -x


@pytest.mark.parametrize("function", [item_branch, bool_branch])
def test_a_branch_on_values_names_its_line(function: Callable[..., object]) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(request(Forward(function)))
    assert not isinstance(caught.value, ShapeContractError)
    lines, start = inspect.getsourcelines(function)
    file, _, line = caught.value.location.rpartition(":")
    assert file == __file__
    assert start <= int(line) < start + len(lines)


def test_an_error_of_the_module_itself_names_its_line() -> None:
    def fails(m: Forward, x: Tensor) -> Tensor:
        raise KeyError("what")

    with pytest.raises(CaptureError, match="KeyError") as caught:
        capture(request(Forward(fails)))
    assert caught.value.location.startswith(__file__)


def set_buffer(m: Forward, x: Tensor) -> Tensor:
    m.kept = m.kept + 1
    return x + m.kept


def add_to_buffer(m: Forward, x: Tensor) -> Tensor:
    m.kept += 1
    return x + m.kept


def add_to_argument(m: Forward, x: Tensor) -> Tensor:
    return x.add_(1)


@pytest.mark.parametrize(("function", "name"), [(set_buffer, "kept"), (add_to_buffer, "kept"), (add_to_argument, "x0")])
def test_what_changes_tensors_that_outlive_the_call_is_refused(function: Callable[..., object], name: str) -> None:
    module = Forward(function)
    kept = module.kept
    with pytest.raises(CaptureError, match=name):
        capture(request(module))
    assert module.kept is kept
    assert torch.equal(kept, torch.zeros(8))


def in_place(m: Forward, x: Tensor) -> Tensor:
    y = x + 1
    y.mul_(2)
    y[:, 2:4] = 0
    y[0] = 5
    y.view(-1)[:3].sub_(m.weight[0])
    return y


def test_in_place_code_becomes_functional() -> None:
    made = capture(request(Forward(in_place)))
    for node in made.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable
    x = torch.randn(5, 8)
    module = torch.fx.GraphModule(nn.Module(), made.graph)
    given = {"x0": x, "weight": torch.ones(8), **made.literals}
    (result,) = module(*(given[i.name] for i in sorted_inputs(made)))
    assert torch.equal(result, in_place(Forward(in_place), x))


def sorted_inputs(made: object) -> list[object]:
    order = [n for n in made.graph.nodes if n.op == "placeholder"]  # type: ignore[attr-defined]
    by_node = {i.node: i for i in made.inputs}  # type: ignore[attr-defined]
    return [by_node[n] for n in order]


def test_buffers_that_no_checkpoint_has_are_literals() -> None:
    made = capture(request(Forward(lambda m, x: x + m.kept + m.computed + m.plain + torch.tensor([0.5] * 8))))
    weights = [i.name for i in made.inputs if i.kind is InputKind.WEIGHT]
    assert set(weights) - set(made.literals) == {"kept"}
    assert torch.equal(made.literals["computed"], torch.arange(8.0))
    others = [v for n, v in made.literals.items() if n != "computed"]
    assert sorted(float(v[0]) for v in others) == [0.5, 3.0]


def test_unused_weights_are_left_out() -> None:
    made = capture(request(Forward(lambda m, x: x + 1)))
    assert [i.name for i in made.inputs] == ["x0"]


def test_unused_computations_are_left_out() -> None:
    def wasteful(m: Forward, x: Tensor) -> Tensor:
        _ = (x @ x.t()).softmax(-1).sum(), x.shape[0] * 3
        return x + 1

    assert len(listing(capture(request(Forward(wasteful))))) == 2  # add and output


def test_a_state_is_neither_weight_nor_literal() -> None:
    wanted = request(
        Forward(lambda m, x: torch.ops.pwtest.count(m.kept, x)),
        states={"kept": TensorInput("kept", ("rows",), "float32")},
        opaque=COUNT,
    )
    made = capture(wanted)
    assert [(i.kind, i.name) for i in made.inputs] == [(InputKind.ARGUMENT, "x0"), (InputKind.STATE, "kept")]
    assert made.literals == {}


def test_parameters_may_be_on_the_meta_device() -> None:
    with torch.device("meta"):
        module = Mlp()
    assert listing(capture(request(module))) == listing(capture(request(Mlp())))


def test_weights_stay_the_modules_own() -> None:
    module = Stack([Mlp()])
    before = {n: p.clone() for n, p in module.named_parameters()}
    capture(request(module))
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in module.named_parameters())


def test_the_traced_files_are_the_users() -> None:
    with garbage_collection_off():  # a test library may run code of its own when garbage is collected
        made = capture(request(Forward(branch), sizes={"rows": Dim(20, 30)}))
    assert {p.name for p in made.sources} == {"test_capture.py", "graphs.py"}
