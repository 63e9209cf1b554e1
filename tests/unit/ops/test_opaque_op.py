"""Declaring operators: what a declaration gives, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import piecework
from piecework import LayerName, LayerNameType, OpError, opaque_op
from piecework.ops.ir.opaque_op import OpaqueOp, declared_op
from piecework.ops.linear import LINEAR_OP
from piecework.ops.opaque import implementation


@opaque_op("ops_test::update", mutates=("cache",))
def update(x: Tensor, cache: Tensor, layer: LayerNameType, eps: float = 1e-6) -> Tensor:
    cache.add_(x)
    return x * 2 + len(str(layer)) + eps


@update.fake
def _(x, cache, layer, eps=1e-6):
    return torch.empty_like(x)


@opaque_op("ops_test::scale_by_name", cuda_graph_safe=True)
def scale_by_name(x: Tensor, layer: str, index: int = 3) -> tuple[Tensor, Tensor]:
    return x * len(layer), x.sum(0) + index


@scale_by_name.fake
def _(x, layer, index=3):
    return torch.empty_like(x), x.new_empty(x.shape[1:])


@opaque_op("ops_test::no_fake")
def no_fake(x: Tensor) -> Tensor:
    return x + 1


def test_what_a_declaration_tells() -> None:
    assert isinstance(update, OpaqueOp)
    assert update.name == "ops_test::update"
    assert update.overload is torch.ops.ops_test.update.default
    assert update.mutates == ("cache",)
    assert update.layer_parameters == ("layer",)
    assert not update.cuda_graph_safe
    assert scale_by_name.cuda_graph_safe
    assert scale_by_name.layer_parameters == ("layer",)
    assert repr(update) == "<opaque op ops_test::update>"


def test_the_schema_says_what_is_changed() -> None:
    arguments = update.overload._schema.arguments
    assert [a.name for a in arguments if a.alias_info and a.alias_info.is_write] == ["cache"]


def test_cuda_graph_safety_is_a_tag() -> None:
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    assert (tag in update.overload.tags) == (tag is not None)
    assert tag not in scale_by_name.overload.tags


def test_the_declaration_is_found_again() -> None:
    for target in ["ops_test::update", "ops_test::update.default", torch.ops.ops_test.update, update.overload]:
        assert declared_op(target) is update
    for target in ["ops_test::other", "nowhere::update", "update", torch.ops.aten.add.Tensor, torch.ops.aten.add, None]:
        assert declared_op(target) is None


def test_calls_give_the_functions_result() -> None:
    x, layer = torch.randn(4, 3), LayerName("abc")
    caches = torch.zeros(2, 4, 3)
    assert torch.equal(update(x, caches[0], layer), update.function(x, caches[1], layer, eps=1e-6))
    assert torch.equal(caches[0], x)
    first, second = scale_by_name(x, "four", index=1)
    assert torch.equal(first, x * 4)
    assert torch.equal(second, x.sum(0) + 1)


def test_the_executor_calls_the_plain_function() -> None:
    assert implementation("ops_test::update") is update.function
    assert implementation("ops_test::update.default") is update.function


def test_copies_are_the_operator_itself() -> None:
    assert copy.deepcopy([update])[0] is update


def test_the_name_is_made_from_package_and_function() -> None:
    @opaque_op
    def named_by_itself(x: Tensor) -> Tensor:
        return x + 1

    assert named_by_itself.name == f"{__name__.partition('.')[0]}::named_by_itself"


# --- what is refused ------------------------------------------------------------------------------------------------


def no_hint(x, y: Tensor) -> Tensor:
    return y


def unsupported(x: Tensor, options: dict[str, int]) -> Tensor:
    return x


def tensor_tuple(x: tuple[Tensor, Tensor]) -> Tensor:
    return x[0]


def variadic(*x: Tensor) -> Tensor:
    return x[0]


def unknown_type(x: Tensor, layer: NoSuchType) -> Tensor:  # noqa: F821
    return x


def strange_default(x: Tensor, sizes: list[int] = [1]) -> Tensor:  # noqa: B006
    return x


def no_result_hint(x: Tensor):
    return x


def strange_result(x: Tensor) -> dict[str, Tensor]:
    return {"x": x}


def pure_nothing(x: Tensor) -> None:
    pass


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (no_hint, "no type hint on parameter 'x'"),
        (unsupported, "parameter 'options' of type dict[str, int]"),
        (tensor_tuple, "parameter 'x' of type tuple"),
        (variadic, "variadic positional parameter"),
        (unknown_type, "NoSuchType"),
        (strange_default, "parameter 'sizes' with the default [1]"),
        (no_result_hint, "no type hint for the result"),
        (strange_result, "a result of type dict[str, torch.Tensor]"),
        (pure_nothing, "nothing would keep it in a graph"),
        (torch.add, "a builtin_function_or_method"),
    ],
)
def test_functions_that_cant_be_operators(function, found: str) -> None:
    with pytest.raises(OpError) as error:
        opaque_op("ops_test::refused")(function)
    assert found in error.value.found
    assert not hasattr(torch.ops.ops_test, "refused")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("refused", "not of the form namespace::name"),
        ("ops_test::", "not of the form"),
        ("ops_test::a.b", "not of the form"),
        ("aten::refused", "a namespace of torch's own"),
    ],
)
def test_names_that_operators_cant_have(name: str, found: str) -> None:
    def refused(x: Tensor) -> Tensor:
        return x + 1

    with pytest.raises(OpError) as error:
        opaque_op(name)(refused)
    assert found in error.value.found


@pytest.mark.parametrize(
    ("mutates", "found"), [(("cash",), "'cash', which is no parameter"), (("eps",), "'eps', which is a float")]
)
def test_mutates_must_name_tensors(mutates: tuple[str, ...], found: str) -> None:
    def refused(x: Tensor, cache: Tensor, eps: float = 1e-6) -> Tensor:
        return x + 1

    with pytest.raises(OpError) as error:
        opaque_op("ops_test::refused", mutates=mutates)(refused)
    assert found in error.value.found


def test_mutates_takes_lists_of_tensors_and_one_name() -> None:
    @opaque_op("ops_test::write_all", mutates="caches")
    def write_all(caches: list[Tensor], x: Tensor) -> None:
        for cache in caches:
            cache.copy_(x)

    caches = [torch.zeros(2), torch.zeros(2)]
    write_all.check(caches, torch.ones(2))
    assert torch.equal(caches[1], torch.ones(2))


@pytest.mark.parametrize(
    "fake",
    [
        lambda x, cache, layer: torch.empty_like(x),
        lambda x, cache, layer, eps=1e-5: torch.empty_like(x),
        lambda x, layer, cache, eps=1e-6: torch.empty_like(x),
        lambda x, cache, layer, eps: torch.empty_like(x),
        lambda x, cache, layer, eps=1e-6, more=0: torch.empty_like(x),
        lambda *, x, cache, layer, eps=1e-6: torch.empty_like(x),
        lambda x, *args: torch.empty_like(x),
    ],
)
def test_a_fake_of_another_signature(fake) -> None:
    with pytest.raises(OpError, match="same names, order and defaults"):
        update.fake(fake)


def test_a_fake_may_leave_the_rest_to_args_and_kwargs() -> None:
    @opaque_op("ops_test::loose_fake")
    def loose_fake(x: Tensor, scale: float, shift: float = 0.0) -> Tensor:
        return x * scale + shift

    @loose_fake.fake
    def _(x, *_args, **_kwargs):
        return torch.empty_like(x)

    loose_fake.check(torch.ones(2), 2.0, shift=1.0)


def test_another_function_under_a_taken_name() -> None:
    def other(x: Tensor) -> Tensor:
        return x

    with pytest.raises(OpError) as error:
        opaque_op("ops_test::update")(other)
    assert "update of " in error.value.found
    assert declared_op("ops_test::update") is update
    with pytest.raises(OpError, match="found: an operator of that name\n"):
        opaque_op(LINEAR_OP)(other)


def test_a_trace_without_a_fake_says_so() -> None:
    assert torch.equal(no_fake(torch.ones(2)), torch.full((2,), 2.0))
    with pytest.raises(OpError, match=r"@no_fake\.fake"):
        no_fake(torch.ones(2, device="meta"))
    with pytest.raises(Exception, match="no fake implementation"):
        torch.compile(lambda x: no_fake(x), backend="eager", fullgraph=True)(torch.ones(2))


# --- imported twice -------------------------------------------------------------------------------------------------

_SOURCE = """
from torch import Tensor
from piecework import opaque_op

@opaque_op("ops_test_twice::shift")
def shift(x: Tensor{more}) -> Tensor:
    return x + {by}

@shift.fake
def _(x{more_fake}):
    return x.new_empty(x.shape)
"""


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_module_that_is_imported_again_replaces_its_operator(tmp_path: Path) -> None:
    path = tmp_path / "ops.py"
    path.write_text(_SOURCE.format(more="", more_fake="", by=1))
    first = load(path, "ops_first")
    overload = first.shift.overload
    path.write_text(_SOURCE.format(more="", more_fake="", by=20))
    second = load(path, "ops_second_name")
    assert second.shift is first.shift
    assert torch.ops.ops_test_twice.shift.default is overload
    assert torch.equal(first.shift(torch.zeros(1)), torch.tensor([20.0]))

    path.write_text(_SOURCE.format(more=", y: Tensor", more_fake=", y", by="y"))
    third = load(path, "ops_first")
    assert declared_op("ops_test_twice::shift") is third.shift
    assert torch.equal(third.shift(torch.zeros(1), torch.ones(1)), torch.ones(1))
    assert torch.equal(torch.ops.ops_test_twice.shift(torch.zeros(1), torch.ones(1)), torch.ones(1))

    path.write_text(_SOURCE.format(more=", y: Tensor", more_fake=", y", by="y").partition("@shift.fake")[0])
    load(path, "ops_without_a_fake")
    with pytest.raises(OpError, match="no fake implementation"):
        third.shift(torch.zeros(1, device="meta"), torch.ones(1, device="meta"))

    elsewhere = tmp_path / "other.py"
    elsewhere.write_text(_SOURCE.format(more="", more_fake="", by=1))
    with pytest.raises(OpError, match="another name"):
        load(elsewhere, "ops_other")


def test_declaring_operators_imports_no_compiler() -> None:
    code = (
        "import sys, piecework\n"
        "from torch import Tensor\n"
        "def f(x: Tensor, layer: piecework.LayerNameType) -> Tensor: return x + 1\n"
        "op = piecework.opaque_op(f)\n"
        "assert op.name == '__main__::f'\n"
        "bad = {'sympy', 'torch._dynamo', 'torch._inductor', 'triton', 'transformers'} & set(sys.modules)\n"
        "raise SystemExit(f'imported {sorted(bad)}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    assert piecework.opaque_op is opaque_op
    assert "check_ops" in piecework.__all__


def test_two_functions_of_one_factory_are_not_one_operator() -> None:
    def make(by: int):
        def add(x: Tensor) -> Tensor:
            return x + by

        return add

    opaque_op("opaque_test::factory")(make(1))
    with pytest.raises(OpError, match="an operator of that name"):
        opaque_op("opaque_test::factory")(make(2))
