"""Names that opaque ops are handed, of whatever type, cost no trace of their own and reach their own layer's op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piecework.capture.capture import capture
from piecework.capture.request import TensorInput
from piecework.ops.ir.layer import IS_OBJECT, LayerName
from tests.unit.capture.graphs import COUNT, Stack, assert_stamped_equals_traced, programs, request
from tests.unit.capture.name_blocks import Block, check, names, stack
from tests.unit.capture.name_ops import NAMES, OPS, by_layer, by_number, by_text, by_two

KINDS = list(NAMES)


HAND_ON: dict[str, Any] = {
    "LayerName": lambda block, x: by_layer(x, block.name),
    "str": lambda block, x: by_text(x, block.name),
    "int": lambda block, x: by_number(x, block.name),
}


@pytest.mark.parametrize("layers", [2, 4, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_one_template_for_all_names(kind: str, layers: int) -> None:
    given = [NAMES[kind](i) for i in range(layers)]
    module = stack(HAND_ON[kind], name=given)
    made = check(module, traced=1, stamped=layers - 1)
    assert names(made) == [n for n in given if n != 0]  # 0 is the operator's default, which torch leaves out
    assert len({p.fingerprint() for p in programs(request(module))}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_are_equal_cost_nothing(kind: str) -> None:
    check(stack(HAND_ON[kind], name=[NAMES[kind](3) for _ in range(4)]), traced=1, stamped=3)


@pytest.mark.parametrize("kind", KINDS)
def test_names_in_submodules(kind: str) -> None:
    def block(i: int) -> nn.Module:
        inner = [Block(HAND_ON[kind], name=NAMES[kind](10 * i + j)) for j in range(2)]
        return nn.Sequential(nn.Sequential(inner[0], nn.ReLU()), inner[1])

    check(Stack([block(i) for i in range(4)]), traced=1, stamped=3)


@pytest.mark.parametrize("kind", KINDS)
def test_names_in_stacks_of_stacks(kind: str) -> None:
    module = Stack(
        [Stack([Block(HAND_ON[kind], name=NAMES[kind](10 * i + j + 1)) for j in range(3)]) for i in range(4)]
    )
    made = check(module)
    assert names(made) == [NAMES[kind](10 * i + j + 1) for i in range(4) for j in range(3)]
    assert made.stacks.traced == 2  # one of them is a block of blocks


@pytest.mark.parametrize("container", [tuple, list, lambda found: {"a": found[0], "b": [found[1], 5]}])
@pytest.mark.parametrize("kind", KINDS)
def test_names_in_containers(kind: str, container: Any) -> None:
    op = OPS[kind]

    def use(block: Any, x: Tensor) -> Tensor:
        found = block.names
        a, b = (found["a"], found["b"][0]) if isinstance(found, dict) else found
        return op(op(x, a), b)

    given = [[NAMES[kind](2 * i + 1), NAMES[kind](2 * i + 2)] for i in range(4)]
    made = check(stack(use, names=[container(g) for g in given]), traced=1, stamped=3)
    assert names(made) == [n for pair in given for n in pair]


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_are_arguments_of_the_blocks(kind: str) -> None:
    class Numbering(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for i, block in enumerate(self.blocks):
                x = block(x, layer=NAMES[kind](i + 1))
            return x

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, *, layer: Any) -> Tensor:
            return OPS[kind](self.linear(x), layer)

    made = check(Numbering([Told() for _ in range(4)]), traced=1, stamped=3)
    assert names(made) == [NAMES[kind](i + 1) for i in range(4)]


def test_names_from_properties() -> None:
    class Named(Block):
        @property
        def name(self) -> str:
            return f"layers.{self.index}"

    module = Stack([Named(HAND_ON["str"], index=i) for i in range(4)])
    assert names(check(module, traced=1, stamped=3)) == [f"layers.{i}" for i in range(4)]


def test_names_that_a_class_has_and_some_blocks_replace() -> None:
    class Named(Block):
        name = "common"

    module = Stack([Named(HAND_ON["str"]) for _ in range(5)])
    module.blocks[1].name, module.blocks[3].name = "one", "three"
    assert names(check(module, traced=1, stamped=4)) == ["common", "one", "common", "three", "common"]


def test_several_names_of_several_kinds() -> None:
    def use(block: Any, x: Tensor) -> Tensor:
        return by_number(by_layer(by_text(x, block.text), block.layer), block.number)

    module = stack(
        use,
        text=["a", "b", "c", "d"],
        layer=[LayerName(n) for n in "efgh"],
        number=[1, 2, 3, 4],
    )
    check(module, traced=1, stamped=3)


def test_a_name_that_differs_only_later_is_found_free_when_it_does() -> None:
    def use(block: Any, x: Tensor) -> Tensor:
        return by_text(by_text(x, block.name), block.group)

    module = stack(use, name=list("abcdef"), group=["g", "g", "g", "h", "h", "i"])
    check(module, traced=1, stamped=5)


def test_a_default_that_some_blocks_have() -> None:
    def use(block: Any, x: Tensor) -> Tensor:
        return torch.ops.pwgraph.listed(x, [block.name, "fixed"], number=block.number)

    check(stack(use, name=list("abcd"), number=[7, 8, 9, 7]), traced=1, stamped=3)


def test_an_argument_by_keyword() -> None:
    check(stack(lambda block, x: by_number(x=x, layer=block.name), name=[3, 0, 5, 7]), traced=1, stamped=3)


def test_an_integer_of_an_operator_whose_schema_has_plain_integers() -> None:
    def use(block: Any, x: Tensor) -> Tensor:
        return torch.ops.pwgraph.listed(x, ["fixed"], number=block.number)

    check(stack(use, number=[1, 2, 3]), traced=1, stamped=2)


def test_a_constant_of_an_opaque_op_is_no_structure() -> None:
    """Alternating windows: they reach the opaque op only, so one trace does for all layers."""

    def use(block: Any, x: Tensor) -> Tensor:
        return by_two(x, block.layer, block.layer, block.window)

    module = stack(use, layer=[LayerName(str(i)) for i in range(6)], window=[0, 12] * 3)
    made = check(module, traced=1, stamped=5)
    assert [n for n in names(made) if isinstance(n, int)] == [12, 12, 12]  # 0 is the default


def test_tied_in_some_blocks_only() -> None:
    """One object under two names in one block, two objects in another: every operator gets its own."""
    one, two, three, four = (LayerName(n) for n in ("one", "two", "three", "four"))

    def use(block: Any, x: Tensor) -> Tensor:
        return by_two(x, block.own, block.shared)

    module = stack(use, own=[one, two, three, four], shared=[one, one, three, three])
    made = check(module)
    assert names(made) == [one, one, two, one, three, three, four, three]
    assert made.stacks.traced == 1


def test_asking_whether_two_names_are_one_object() -> None:
    one, two, three, four = (LayerName(n) for n in ("one", "two", "three", "four"))

    def use(block: Any, x: Tensor) -> Tensor:
        return by_layer(x, block.own) if block.own is block.shared else by_two(x, block.own, block.shared)

    module = stack(use, own=[one, two, three, four], shared=[one, one, three, three])
    check(module, traced=2, stamped=2)


def test_names_beside_states() -> None:
    class Counter(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1), persistent=False)
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            return by_text(torch.ops.pwtest.count(self.seen, x), self.name)

    module = Stack([Counter(n) for n in "abcd"])
    states = {f"blocks.{i}.seen": TensorInput(f"blocks.{i}.seen", ("rows",), "float32") for i in range(4)}
    assert_stamped_equals_traced(request(module, states=states, opaque=COUNT), traced=1, stamped=3)


def test_layer_names_outside_of_stacks() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.name = LayerName("outside")

        def forward(self, x: Tensor) -> Tensor:
            return by_layer(by_layer(x, self.name), self.name)

    assert names(check(Outside(), traced=0, stamped=0)) == [LayerName("outside")] * 2


def test_layer_names_in_graphs_with_in_place_code() -> None:
    def use(block: Any, x: Tensor) -> Tensor:
        x = x + 1
        x.mul_(2)
        return by_layer(x, block.name)

    check(stack(use, name=[LayerName(str(i)) for i in range(4)]), traced=1)


def test_operators_need_not_be_listed_as_opaque() -> None:
    module = stack(HAND_ON["str"], name=["a", "b"])
    assert [len(p.calls) for p in programs(request(module))] == [2, 2]
    assert [len(p.calls) for p in programs(request(module, opaque=frozenset({"aten::relu"})))] == [1, 1]


def test_an_operator_that_decomposes_is_none_of_its_own() -> None:
    module = stack(lambda block, x: torch.ops.pwgraph.decomposed(x, block.name), name=["a", "bb", "ccc"])
    made = check(module, traced=3, stamped=0)
    assert not names(made)


def test_names_have_the_types_that_they_had() -> None:
    for kind in KINDS:
        made = capture(request(stack(HAND_ON[kind], name=[NAMES[kind](i + 1) for i in range(4)])))
        assert [type(n) for n in names(made)] == [type(NAMES[kind](0)) if kind != "LayerName" or IS_OBJECT else str] * 4
