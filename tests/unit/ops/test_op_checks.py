"""Operators that don't do what they declare are caught, by `check` and by `check_ops`, having run once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from piecework import LayerName, LayerNameType, OpError, check_ops, opaque_op


@opaque_op("checks_test::add", mutates=("count",))
def add(x: Tensor, y: Tensor, count: Tensor, layer: LayerNameType) -> Tensor:
    count += 1
    return x + y


@add.fake
def _(x, y, count, layer):
    return torch.empty_like(x)


@opaque_op("checks_test::sneaky")
def sneaky(x: Tensor, cache: Tensor, value: float = 1.0) -> Tensor:
    cache.fill_(value)
    return x + 1


@sneaky.fake
def _(x, cache, value=1.0):
    return torch.empty_like(x)


@opaque_op("checks_test::alias", mutates=("y",))
def alias(x: Tensor, y: Tensor, which: int) -> tuple[Tensor, Tensor]:
    y += 1
    new = x + 1
    return [(x.view(-1), new), (y, new), (new, new.view(-1)), (new, new + 1)][which]


@alias.fake
def _(x, y, which):
    return torch.empty_like(x), torch.empty_like(x)


@opaque_op("checks_test::shaped")
def shaped(x: Tensor, how: str) -> Tensor:
    return {
        "right": lambda: x + 1,
        "shape": lambda: x[1:] + 1,
        "dtype": lambda: x.double() + 1,
        "stride": lambda: (x + 1).t().contiguous().t(),
    }[how]()


@shaped.fake
def _(x, how):
    return x.new_empty(x.shape)


@opaque_op("checks_test::nonzero")
def nonzero(x: Tensor) -> Tensor:
    return x.nonzero()


@nonzero.fake
def _(x):
    return x.new_empty((torch.library.get_ctx().new_dynamic_size(), x.dim()), dtype=torch.int64)


@opaque_op("checks_test::many")
def many(xs: list[Tensor], how: str) -> list[Tensor]:
    if how == "write":
        xs[1].zero_()
    return [x + 1 for x in xs[: 1 if how == "fewer" else None]]


@many.fake
def _(xs, how):
    return [torch.empty_like(x) for x in xs]


def by_check(op, *args):
    return op.check(*args)


def by_check_ops(op, *args):
    with check_ops():
        return op(*args)


@pytest.fixture(params=[by_check, by_check_ops])
def run(request: pytest.FixtureRequest):
    return request.param


def test_a_right_operator_runs_once_and_gives_its_result(run) -> None:
    x, count = torch.randn(4, 3), torch.zeros(())
    assert torch.equal(run(add, x, x, count, LayerName("a")), x + x)
    assert count == 1


def test_an_undeclared_mutation(run) -> None:
    with pytest.raises(OpError, match="'cache' is not declared as changed, and its values changed") as error:
        run(sneaky, torch.ones(3), torch.zeros(3))
    assert error.value.try_.startswith("add 'cache' to `mutates`")


def test_an_undeclared_write_of_the_same_values() -> None:
    with pytest.raises(OpError, match="written to, with the values that it had"):
        sneaky.check(torch.ones(3), torch.ones(3))


def test_values_that_are_not_numbers_are_no_change(run) -> None:
    x = torch.full((3,), float("nan"))
    run(add, x, x, torch.zeros(()), LayerName("a"))


def test_an_undeclared_mutation_inside_a_list(run) -> None:
    with pytest.raises(OpError, match=r"'xs\[1\]' is not declared"):
        run(many, [torch.ones(2), torch.ones(2)], "write")


def test_an_undeclared_change_of_shape(run) -> None:
    @opaque_op("checks_test::resize")
    def resize(x: Tensor) -> Tensor:
        x.resize_(2)
        return x.new_zeros(1)

    @resize.fake
    def _(x):
        return x.new_zeros(1)

    with pytest.raises(OpError, match=r"its shape was \[4\] and is \[2\]"):
        run(resize, torch.ones(4))


@pytest.mark.parametrize(
    ("which", "found"),
    [
        (0, "result 0 shares memory with argument 'x'"),
        (1, "result 0 shares memory with argument 'y'"),
        (2, "result 1 shares memory with result 0"),
    ],
)
def test_results_that_share_memory(run, which: int, found: str) -> None:
    with pytest.raises(OpError) as error:
        run(alias, torch.ones(4), torch.ones(4), which)
    assert error.value.found == found


def test_results_that_share_none(run) -> None:
    run(alias, torch.ones(4), torch.ones(4), 3)


def test_a_changed_argument_that_another_one_overlaps(run) -> None:
    x = torch.ones(4)
    with pytest.raises(OpError, match="'count', which it changes, shares memory with argument 'x'"):
        run(add, x, x, x[:1].squeeze(), LayerName("a"))
    assert torch.equal(x, torch.ones(4)), "it is found before the call"


def test_disjoint_views_of_one_tensor_are_allowed(run) -> None:
    cache = torch.zeros(4, 2)
    out = run(alias, cache[:, 0], cache[:, 1], 3)
    assert torch.equal(out[0], torch.ones(4))
    assert torch.equal(cache, torch.tensor([[0.0, 1.0]]).expand(4, 2))


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("shape", "shape [3, 3], the fake implementation's [4, 3]"),
        ("dtype", "dtype torch.float64, the fake implementation's torch.float32"),
        ("stride", "stride (of sizes other than 1) [1, 4], the fake implementation's [3, 1]"),
    ],
)
def test_a_result_unlike_the_fakes(run, how: str, found: str) -> None:
    with pytest.raises(OpError) as error:
        run(shaped, torch.ones(4, 3), how)
    assert error.value.found == f"the result has {found}"
    run(shaped, torch.ones(4, 3), "right")


def test_strides_of_sizes_of_one_and_of_empty_tensors_dont_matter(run) -> None:
    run(shaped, torch.ones(1, 3), "stride")
    run(shaped, torch.ones(0, 3), "stride")


def test_fewer_results_than_the_fakes(run) -> None:
    with pytest.raises(OpError, match="1 results, where the fake implementation gives 2"):
        run(many, [torch.ones(2), torch.ones(2)], "fewer")


def test_sizes_that_depend_on_data_may_be_anything(run) -> None:
    assert run(nonzero, torch.tensor([0, 1, 1])).shape == (2, 1)


def test_a_missing_fake_is_found_before_the_call(run) -> None:
    calls = []

    @opaque_op(f"checks_test::no_fake_{id(calls)}")
    def no_fake(x: Tensor) -> Tensor:
        calls.append(x)
        return x + 1

    with pytest.raises(OpError, match="no fake implementation"):
        run(no_fake, torch.ones(2))
    assert not calls


def test_inference_mode(run) -> None:
    with torch.inference_mode():
        run(add, torch.ones(3), torch.ones(3), torch.zeros(()), LayerName("a"))
        with pytest.raises(OpError, match="'cache' is not declared"):
            run(sneaky, torch.ones(3), torch.zeros(3))


def test_other_operators_run_as_ever() -> None:
    with check_ops():
        x = torch.ones(3)
        x.add_(1)
    assert torch.equal(x, torch.full((3,), 2.0))
    sneaky(torch.ones(3), torch.zeros(3))


def test_traces_inside_are_left_alone() -> None:
    with check_ops():
        out = sneaky(torch.ones(3, device="meta"), torch.zeros(3, device="meta"))
    assert out.shape == (3,)
