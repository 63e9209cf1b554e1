"""Code that looks at its block's name gets what the name asks for, in every block, whether blocks are shared or not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from piecework.capture.capture import capture
from piecework.ops.ir.layer import LayerName, resolve
from tests.unit.capture.graphs import Stack, listing, request
from tests.unit.capture.name_blocks import Block, check, names, stack
from tests.unit.capture.name_ops import by_layer, by_number, by_text

TEXTS = [f"layers.{i}" for i in range(5)]
NUMBERS = [1, 2, 3, 0, 4]
TABLE = {text: i + 1 for i, text in enumerate(TEXTS)}
FACTORS = [2.0, 3.0, 5.0, 7.0, 11.0]


def later(b: Any, x: Tensor) -> Tensor:
    """Hand the name on as well, after it was looked at."""
    return by_text(x, b.name) if isinstance(b.name, str) else by_number(x, b.name)


TEXT_USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "equal": lambda b, x: x * 2 if b.name == "layers.2" else x,
    "equal, reflected": lambda b, x: x * 2 if "layers.3" == b.name else x,  # noqa: SIM300
    "unequal": lambda b, x: x * 2 if b.name != "layers.1" else x,
    "less": lambda b, x: x * 2 if b.name < "layers.3" else x,
    "ends": lambda b, x: x * 2 if b.name.endswith("4") else x,
    "formatted": lambda b, x: by_text(x, f"{b.name}.attn"),
    "formatted, old": lambda b, x: by_text(x, "%s.attn" % b.name),  # noqa: UP031
    "formatted, by method": lambda b, x: by_text(x, "{}.attn".format(b.name)),  # noqa: UP032
    "joined": lambda b, x: by_text(x, ".".join([b.name, "attn"])),
    "added": lambda b, x: by_text(x, b.name + ".attn"),
    "added in front": lambda b, x: by_text(x, "model." + b.name),
    "key": lambda b, x: x * TABLE[b.name],
    "key with a default": lambda b, x: x * {"layers.2": 5}.get(b.name, 1),
    "key of a new dict": lambda b, x: x * {b.name: 5}.get("layers.2", 1),
    "member of a list": lambda b, x: x * 2 if b.name in ["layers.2", "layers.3"] else x,
    "member of a set": lambda b, x: x * 2 if b.name in {"layers.2", "layers.3"} else x,
    "part of a string": lambda b, x: x * 2 if b.name in "layers.2 layers.3" else x,
    "part of a string from elsewhere": lambda b, x: x * 2 if b.name in str(("layers.2",)) else x,
    "contains": lambda b, x: x * 2 if "2" in b.name else x,
    "searched": lambda b, x: x * 2 if re.search(r"\.[23]$", b.name) else x,
    "searched by a compiled pattern": lambda b, x: x * 2 if PATTERN.match(b.name) else x,
    "searched in": lambda b, x: x * 2 if "layers.2 and more".startswith(b.name) else x,
    "found": lambda b, x: x * (2 + "layers.2 layers.3".find(b.name)),
    "split": lambda b, x: x * int(b.name.split(".")[1]),
    "last character": lambda b, x: x * int(b.name[-1]),
    "length": lambda b, x: x * len(b.name),
    "iterated": lambda b, x: x * sum(ord(c) for c in b.name),
    "hashed": lambda b, x: x * (hash(b.name) == hash("layers.2")),
    "sorted": lambda b, x: x * sorted(["layers.2", b.name]).index("layers.2"),
    "copied": lambda b, x: x * 2 if str(b.name) == "layers.2" else x,
    "its type": lambda b, x: x * 2 if type(b.name) is str else x,
    "its type, and looked at": lambda b, x: x * 2 if type(b.name) is str and b.name == "layers.2" else x,
    "an instance": lambda b, x: x * 2 if isinstance(b.name, str) and b.name == "layers.2" else x,
    "matched": lambda b, x: matched(b.name, x),
    "dumped": lambda b, x: by_text(x, json.dumps({"name": b.name})),
    "counted": lambda b, x: x * "layers.2 layers.3".count(b.name),
    "bytes": lambda b, x: x * (bytes(b.name, "utf8")[-1] % 3),
    "number in another base": lambda b, x: x * 2 if int(b.name.replace("layers.", ""), 36) > 2 else x,
    "attribute": lambda b, x: x * getattr(Table, b.name.replace(".", "_")),
    "of a caught error": lambda b, x: caught(b, x),
    "in a comprehension": lambda b, x: x * sum(n in "layers.2 layers.3" for n in [b.name]),
    "then handed on": lambda b, x: later(b, x * 2 if b.name == "layers.2" else x),
    "handed on, then looked at": lambda b, x: by_text(x, b.name) * (2 if b.name == "layers.2" else 1),
}


class Table:
    layers_0, layers_1, layers_2, layers_3, layers_4 = FACTORS


PATTERN = re.compile(r"layers\.[34]")


def matched(name: str, x: Tensor) -> Tensor:
    match name:
        case "layers.2":
            return x * 2
        case _:
            return x


def caught(b: Any, x: Tensor) -> Tensor:
    try:
        return by_text(x, b.name + 1)
    except Exception:  # noqa: BLE001
        return by_text(x * 2, b.name)


@pytest.mark.parametrize("use", TEXT_USES)
def test_a_string_that_is_looked_at(use: str) -> None:
    compare(stack(TEXT_USES[use], name=TEXTS))


@pytest.mark.parametrize("use", TEXT_USES)
def test_the_string_of_a_layer_name_that_is_looked_at(use: str) -> None:
    def unwrap(b: Any, x: Tensor) -> Tensor:
        return TEXT_USES[use](Unwrapped(resolve(b.layer)), x)

    compare(stack(unwrap, layer=[LayerName(t) for t in TEXTS]))


class Unwrapped:
    def __init__(self, name: str) -> None:
        self.name = name


INT_USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "equal": lambda b, x: x * 2 if b.name == 3 else x,
    "equal, reflected": lambda b, x: x * 2 if 3 == b.name else x,  # noqa: SIM300
    "less": lambda b, x: x * 2 if b.name < 3 else x,
    "true": lambda b, x: x * 2 if b.name else x,
    "remainder": lambda b, x: x * 2 if b.name % 2 else x,
    "index": lambda b, x: x * FACTORS[b.name],
    "slice": lambda b, x: x * sum(FACTORS[: b.name]),
    "end of a slice that is clipped": lambda b, x: x * len(FACTORS[1 : 1 + b.name * 3]),
    "key": lambda b, x: x * {1: 2, 2: 3, 3: 4, 0: 5, 4: 6}[b.name],
    "factor": lambda b, x: x * b.name,
    "factor, reflected": lambda b, x: b.name * x,
    "sum": lambda b, x: x + b.name,
    "exponent": lambda b, x: x**b.name,
    "of a list": lambda b, x: x * len([0] * b.name),
    "of a range": lambda b, x: loop(b.name, x),
    "enumerated": lambda b, x: x * max([0, *range(b.name)]),
    "formatted": lambda b, x: by_text(x, f"layers.{b.name:02d}"),
    "member": lambda b, x: x * 2 if b.name in (2, 3) else x,
    "member of a range": lambda b, x: x * 2 if b.name in range(2, 4) else x,
    "size": lambda b, x: x * torch.ones(b.name).sum(),
    "view": lambda b, x: x.view(x.shape[0], 2 ** (b.name % 3), -1).flip(1).reshape(x.shape),
    "view, direct": lambda b, x: x.reshape(x.shape[0], 8 // max(b.name, 1), -1).sum(1)[:, :1] + x,
    "tensor's index": lambda b, x: x * x[:, b.name : b.name + 1],
    "tensor's end": lambda b, x: x * x[:, : b.name + 1].sum(1, keepdim=True),
    "tensor's element": lambda b, x: x * x[:, b.name].unsqueeze(1),
    "axis": lambda b, x: x * x.sum(b.name % 2, keepdim=True) * 0.1,
    "shift": lambda b, x: x.roll(b.name, 1),
    "converted": lambda b, x: x * float(b.name),
    "its type": lambda b, x: x * 2 if type(b.name) is int else x,
    "its type, and looked at": lambda b, x: x * 2 if type(b.name) is int and b.name == 3 else x,
    "an instance": lambda b, x: x * 2 if isinstance(b.name, int) and b.name == 3 else x,
    "dumped": lambda b, x: by_text(x, json.dumps([b.name])),
    "negated": lambda b, x: x * -b.name,
    "bits": lambda b, x: x * b.name.bit_length(),
    "pieces": lambda b, x: x + torch.chunk(x, b.name + 1, dim=1)[0].sum(),
    "unsqueezed": lambda b, x: x + x.unsqueeze(b.name % 2).sum(),
    "unsqueezed, direct": lambda b, x: x + x.unsqueeze(min(b.name, 2)).sum(),
    "then handed on": lambda b, x: later(b, x * 2 if b.name == 3 else x),
}


def loop(times: int, x: Tensor) -> Tensor:
    for _ in range(times):
        x = x * 1.5
    return x


@pytest.mark.parametrize("use", INT_USES)
def test_an_integer_that_is_looked_at(use: str) -> None:
    compare(stack(INT_USES[use], name=NUMBERS))


def compare(module: nn.Module) -> None:
    """See `check`; how many blocks are alike is another question."""
    check(module)


LAYER_USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "equal": lambda b, x: x * 2 if b.name == LayerName("layers.2") else x,
    "equal, reflected": lambda b, x: x * 2 if LayerName("layers.2") == b.name else x,
    "key": lambda b, x: x * {LayerName(t): i + 1 for i, t in enumerate(TEXTS)}[b.name],
    "formatted": lambda b, x: by_text(x, f"{b.name}"),
    "its type": lambda b, x: x * 2 if type(b.name) is LayerName else x,
    "resolved and looked at": lambda b, x: x * 2 if resolve(b.name) == "layers.2" else x,
    "then handed on": lambda b, x: by_layer(x * 2 if b.name.value == "layers.2" else x, b.name),
}


@pytest.mark.parametrize("use", LAYER_USES)
def test_a_layer_name_that_is_looked_at(use: str) -> None:
    compare(stack(LAYER_USES[use], name=[LayerName(t) for t in TEXTS]))


def test_the_string_of_a_layer_name_is_free_too() -> None:
    module = stack(lambda b, x: by_text(x, resolve(b.name)), name=[LayerName(t) for t in TEXTS])
    assert names(check(module, traced=1, stamped=4)) == TEXTS


@pytest.mark.parametrize("op", [torch.ops.pwgraph.widened, torch.ops.pwgraph.widened_meta])
def test_a_name_that_a_fake_implementation_looks_up(op: Any) -> None:
    def use(b: Any, x: Tensor) -> Tensor:
        return x + op(x, b.name).sum(1, keepdim=True)

    given = ["even", "odd", "even", "odd", "odd"]
    module = stack(use, name=given)
    made = check(module, traced=2, stamped=3)
    widths = [n.meta["val"].shape[1] for n in made.graph.nodes if "widened" in str(n.target)]
    assert widths == [8, 16, 8, 16, 16]


def test_blocks_that_branch_on_their_number_share_with_those_that_do_the_same() -> None:
    check(stack(INT_USES["remainder"], name=[0, 1, 2, 3, 4]), traced=2, stamped=3)


@pytest.mark.parametrize("use", ["formatted", "joined", "dumped"])
def test_a_name_that_is_made_of_another_name_is_its_own_in_every_block(use: str) -> None:
    made = names(check(stack(TEXT_USES[use], name=TEXTS), traced=1, stamped=4))
    assert made == ([json.dumps({"name": t}) for t in TEXTS] if use == "dumped" else [f"{t}.attn" for t in TEXTS])


@pytest.mark.parametrize(
    "use",
    [
        lambda b, x: x * 2 if int(b.name, 16) > 9 else x,
        lambda b, x: x * 2 if complex(b.name).real > 9 else x,
        lambda b, x: x * 2 if bytes(b.name, "utf8") > b"9" else x,
        lambda b, x: x * 2 if ord(b.name) > 57 else x,
        lambda b, x: x * 2 if b.name in "0a" else x,
    ],
)
def test_what_tells_one_block_apart_only(use: Callable[[Any, Tensor], Tensor]) -> None:
    """The first two blocks do the same, so comparing their traces says nothing."""
    compare(stack(use, name=["1", "2", "3", "a" if "complex" not in use.__code__.co_names else "10", "4"]))


def test_one_name_that_is_looked_at_leaves_the_others_free() -> None:
    """A window that changes what is computed, and a name that doesn't: two templates for six blocks."""

    def use(b: Any, x: Tensor) -> Tensor:
        return by_text(x * 2 if b.window else x, b.name)

    module = stack(use, name=[str(i) for i in range(8)], window=[0, 12] * 4)
    check(module, traced=2, stamped=6)


def test_a_name_among_the_results() -> None:
    class Telling(Stack):
        def forward(self, x: Tensor) -> Any:
            told = []
            for block in self.blocks:
                x, name = block(x)
                told.append(name)
            return x, told

    module = Telling([Block(lambda b, x: x) for _ in range(3)])
    use = tell
    for i, block in enumerate(module.blocks):
        block.use, block.name = use, f"layers.{i}"
    made, whole = capture(request(module)), capture(request(module), templates=False)
    assert listing(made) == listing(whole)
    assert made.structure == whole.structure
    assert all(type(t["const"]) is str for t in made.structure["tuple"][1]["list"])


def tell(b: Any, x: Tensor) -> Any:
    return x + 1, b.name


def test_a_name_that_the_block_keeps() -> None:
    def use(b: Any, x: Tensor) -> Tensor:
        b.last = b.name
        return by_text(x, b.last)

    module = stack(use, name=TEXTS)
    check(module, traced=1, stamped=4)
    assert [b.last for b in module.blocks] == TEXTS


def test_a_list_of_names_that_the_block_changes() -> None:
    def use(b: Any, x: Tensor) -> Tensor:
        b.names.reverse()
        return by_text(x, b.names[0])

    module = stack(use, names=[["a", "b"], ["c", "d"], ["e", "f"]])
    made = capture(request(module))
    assert (made.stacks.traced, names(made)) == (1, ["b", "d", "f"])
    assert [b.names for b in module.blocks] == [["b", "a"], ["d", "c"], ["f", "e"]]


def test_a_submodule_by_name() -> None:
    class Choosing(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            return by_text(self.parts[self.name](x), self.name)

    compare(Stack([Choosing(n) for n in ("a", "b", "b", "a")]))


def test_a_name_that_is_handed_on_to_a_wrong_operator() -> None:
    """What can't be traced fails with the error that the code gives in eager mode."""
    module = stack(lambda b, x: by_number(x, b.name), name=["a", "b"])
    with pytest.raises(Exception, match="pwgraph::by_number"):
        capture(request(module))


def test_an_error_that_depends_on_the_name() -> None:
    def use(b: Any, x: Tensor) -> Tensor:
        if b.name == "layers.2":
            raise RuntimeError("not this one")
        return x

    with pytest.raises(Exception, match="not this one"):
        capture(request(stack(use, name=TEXTS)))


def test_code_that_catches_everything() -> None:

    class Catching(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                try:
                    x = block(x)
                except BaseException:  # noqa: BLE001
                    x = x * 0
            return x

    module = Catching(list(stack(TEXT_USES["its type, and looked at"], name=TEXTS).blocks))
    check(module, traced=2, stamped=3)
