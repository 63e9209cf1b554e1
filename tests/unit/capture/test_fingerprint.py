"""What a piece's fingerprint ignores and what it tells apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from piecework.capture.request import Dim
from piecework.ops.ir.program import Program
from tests.unit.capture.graphs import TWO, programs, request

names = st.lists(st.from_regex(r"[a-z]{1,8}[0-9]{0,2}", fullmatch=True), min_size=3, max_size=3, unique=True).filter(
    lambda found: not any(hasattr(nn.Module, n) or n in {"training", "order"} for n in found)
)


class Renamed(nn.Module):
    """norm, linear, linear under any names."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.order = order
        for name, part in zip(order, [nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)], strict=True):
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = (getattr(self, n) for n in self.order)
        return x + third(torch.relu(second(first(x)) * 0.5))


def one(wanted: object) -> str:
    (program,) = programs(wanted)  # type: ignore[arg-type]
    assert Program.from_json(program.to_json()).fingerprint() == program.fingerprint()
    return program.fingerprint()


@settings(max_examples=15, deadline=None)
@given(names)
def test_names_of_modules_change_nothing(order: list[str]) -> None:
    assert one(request(Renamed(order))) == one(request(Renamed(["norm", "up", "down"])))


@settings(max_examples=8, deadline=None)
@given(st.from_regex(r"[a-z]{1,6}[0-9]{0,2}", fullmatch=True))
def test_names_of_sizes_change_nothing(size: str) -> None:
    made = request(Renamed(["a", "b", "c"]), (size, 8), sizes={size: Dim(1, 64)})
    assert one(made) == one(request(Renamed(["a", "b", "c"])))


def test_values_of_weights_change_nothing() -> None:
    torch.manual_seed(0)
    first = one(request(Renamed(["a", "b", "c"])))
    torch.manual_seed(1)
    assert one(request(Renamed(["a", "b", "c"]))) == first


class F(nn.Module):
    def __init__(self, function: Callable[..., Tensor], *shape: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.ones(shape or (8, 8), dtype=dtype))

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self.w, *args)


def base(w: Tensor, x: Tensor) -> Tensor:
    return (x @ w) * 0.5


VARIANTS: dict[str, object] = {
    "base": lambda: request(F(base)),
    "constant": lambda: request(F(lambda w, x: (x @ w) * 0.25)),
    "constant's type": lambda: request(F(lambda w, x: (x @ w) * 1)),
    "constant's type, float": lambda: request(F(lambda w, x: (x @ w) * 1.0)),
    "infinite constant": lambda: request(F(lambda w, x: (x @ w) * float("inf"))),
    "negative zero": lambda: request(F(lambda w, x: (x @ w) * -0.0)),
    "zero": lambda: request(F(lambda w, x: (x @ w) * 0.0)),
    "operator": lambda: request(F(lambda w, x: (x @ w) + 0.5)),
    "order of arguments": lambda: request(F(lambda w, x: (w @ x.t()) * 0.5)),
    "order of operators": lambda: request(F(lambda w, x: (x * 0.5) @ w)),
    "weight's shape": lambda: request(F(base, 8, 16)),
    "weight's dtype": lambda: request(F(lambda w, x: (x @ w.float()) * 0.5, dtype=torch.bfloat16)),
    "input's dtype": lambda: request(F(base, dtype=torch.bfloat16), dtype="bfloat16"),
    "cast's dtype": lambda: request(F(lambda w, x: (x @ w).double() * 0.5)),
    "other cast's dtype": lambda: request(F(lambda w, x: (x @ w).half() * 0.5)),
    "fixed size": lambda: request(F(base), (32, 8)),
    "other fixed size": lambda: request(F(base), (33, 8)),
    "range's end": lambda: request(F(base), sizes={"rows": Dim(1, 65)}),
    "range's begin": lambda: request(F(base), sizes={"rows": Dim(2, 64)}),
    "one size twice": lambda: request(F(lambda w, x, y: (x @ w) @ y.t()), ("rows", 8), ("rows", 8)),
    "two sizes": lambda: request(
        F(lambda w, x, y: (x @ w) @ y.t()), ("rows", 8), ("cols", 8), sizes={"rows": Dim(1, 64), "cols": Dim(1, 64)}
    ),
    "a second output": lambda: request(F(lambda w, x: ((x @ w) * 0.5, x @ w))),  # type: ignore[arg-type, return-value]
    "the weight twice": lambda: request(F(lambda w, x: (x @ w) @ w)),
}


def test_everything_that_changes_code_changes_the_fingerprint() -> None:
    made: dict[str, str] = {}
    for name, wanted in VARIANTS.items():
        found = one(wanted())  # type: ignore[operator]
        assert found not in made, f"{name} is taken for {made[found]}"
        made[found] = name


def test_the_stride_of_what_comes_from_outside_changes_the_fingerprint() -> None:
    def wanted(transpose: bool) -> object:
        def forward(w: Tensor, x: Tensor) -> Tensor:
            y = (x @ w).relu()
            made, _ = torch.ops.pwtest.two(x, 1, 2.0)
            return (y.t() if transpose else y) @ (made if transpose else made.t())

        return request(F(forward), (8, 8), sizes={}, opaque=TWO)

    plain, turned = (programs(wanted(t))[-1] for t in (False, True))  # type: ignore[arg-type]
    assert plain.fingerprint() != turned.fingerprint()


def test_an_argument_of_another_stride_is_another_piece() -> None:
    from dataclasses import replace

    from piecework.capture.request import TensorInput

    wanted = request(F(base), (4, 8), sizes={})
    turned = replace(wanted, inputs=(TensorInput("x0", (4, 8), "float32", stride=(1, 4)),))
    assert one(wanted) != one(turned)


@pytest.mark.parametrize("number", [1, 2])
def test_arguments_of_opaque_ops_are_in_no_piece(number: int) -> None:
    def forward(w: Tensor, x: Tensor) -> Tensor:
        a, b = torch.ops.pwtest.two(x @ w, number, 2.5)
        return a * b

    made = programs(request(F(forward), opaque=TWO))
    assert [len(p.calls) for p in made] == [1, 1]
    assert "2.5" not in str([p.to_json() for p in made])
