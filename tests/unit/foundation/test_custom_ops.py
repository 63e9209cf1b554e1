"""What piecework relies on in torch's private API to declare operators and to look at their calls."""

from __future__ import annotations

import torch

from piecework.foundation.torch_private import (
    attach_declaration,
    attached_declaration,
    can_run_on_meta,
    cuda_graph_unsafe_tags,
    fake_results,
    find_overload,
    intercept_calls,
    is_stand_in,
    withdraw,
)
from piecework.foundation.torch_private.custom_ops import has_device_kernel


def define(name: str, by: int) -> torch.library.Library:
    library = torch.library.Library("custom_ops_test", "FRAGMENT")
    library.define(f"{name}(Tensor x) -> Tensor")
    library.impl(name, lambda x: x + by, "CompositeExplicitAutograd")
    return library


def test_only_operators_are_found() -> None:
    """`torch.ops` has functions too, and gives a namespace for any name."""
    for name in ("load_library::__call__", "load_library::x.default", "aten::__class__", "aten::add.op", "aten::add.x"):
        assert find_overload(name) is None
    for name in ("", "aten", "aten::", "aten::relu.default.x", "aten::relu default", "aten::add.__init__"):
        assert find_overload(name) is None


def test_what_tensors_on_the_meta_device_can_stand_for() -> None:
    assert can_run_on_meta(find_overload("aten::mm"))
    assert can_run_on_meta(find_overload("aten::linear")), "it is made of others"

    @torch.library.custom_op("custom_ops_test::no_fake", mutates_args=())
    def made(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    assert not can_run_on_meta(find_overload("custom_ops_test::no_fake"))
    made.register_fake(torch.empty_like)
    assert can_run_on_meta(find_overload("custom_ops_test::no_fake"))


def test_operators_are_found_by_name() -> None:
    assert find_overload("aten::add.Tensor") is torch.ops.aten.add.Tensor
    assert find_overload("aten::relu") is torch.ops.aten.relu.default
    for name in ["aten::no_such", "aten::relu.no_such", "nowhere::relu", "relu", "::", ""]:
        assert find_overload(name) is None


def test_which_devices_an_operator_has_kernels_for() -> None:
    library = torch.library.Library("custom_ops_test", "FRAGMENT")
    library.define("somewhere(Tensor x) -> Tensor")
    assert not has_device_kernel("custom_ops_test::somewhere", device="cpu")
    library.impl("somewhere", lambda x: x + 1, "CPU")
    assert has_device_kernel("custom_ops_test::somewhere", device="cpu")
    assert not has_device_kernel("custom_ops_test::somewhere", device="cuda")
    assert not has_device_kernel("custom_ops_test::nowhere", device="cpu")
    withdraw(library)


def test_a_declaration_stays_with_the_operator() -> None:
    library = define("attached", 1)
    overload = torch.ops.custom_ops_test.attached.default
    assert attached_declaration(overload) is None
    attach_declaration(overload, "declaration")
    assert attached_declaration(torch.ops.custom_ops_test.attached) == "declaration"
    assert attached_declaration(find_overload("custom_ops_test::attached")) == "declaration"
    assert attached_declaration("attached") is None
    withdraw(library)


def test_a_withdrawn_name_is_free_again() -> None:
    library = define("again", 1)
    assert torch.ops.custom_ops_test.again(torch.zeros(1)) == 1
    withdraw(library)
    assert find_overload("custom_ops_test::again") is None
    library = define("again", 2)
    assert torch.ops.custom_ops_test.again(torch.zeros(1)) == 2
    withdraw(library)


def test_fake_results_have_metadata_only() -> None:
    out = fake_results(torch.ops.aten.add.Tensor, (torch.ones(2, 1), torch.ones(3)), {"alpha": 2})
    assert is_stand_in(out)
    assert out.shape == (2, 3)
    assert not is_stand_in(torch.ones(2))
    assert is_stand_in(torch.ones(2, device="meta"))


def test_calls_are_intercepted() -> None:
    seen = []

    def handle(target, args, kwargs):
        seen.append((target, dict(kwargs)))
        return target(*args, **kwargs)

    x = torch.ones(2)
    with intercept_calls(handle):
        out = torch.add(x, x, alpha=2)
    assert out.tolist() == [3.0, 3.0]
    assert seen == [(torch.ops.aten.add.Tensor, {"alpha": 2})]


def test_the_tag_that_keeps_operators_out_of_cuda_graphs() -> None:
    assert all(isinstance(tag, torch.Tag) for tag in cuda_graph_unsafe_tags())
    assert [t.name for t in cuda_graph_unsafe_tags()] in ([], ["cudagraph_unsafe"])
