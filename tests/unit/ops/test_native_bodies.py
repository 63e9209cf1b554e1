"""Which calls a compiled body serves, and that they are found through the running selection only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import piecework
from piecework.errors import OpError
from piecework.foundation.torch_private import computes_plainly
from piecework.ops.activations import gelu_mul, silu_mul
from piecework.ops.ir.call_form import CallForm, TensorForm
from piecework.ops.ir.native_bodies import NOT_COMPILED, NativeBodies, NativeBody
from piecework.ops.ir.provider_order import ProviderOrder
from piecework.ops.ir.selection import Selection, current_selection, entering, leaving, selecting
from piecework.ops.norms import rms_norm
from piecework.ops.quantize import quantize_dynamic_per_token
from piecework.providers.discovery import load_providers

load_providers(["aten"])
HALF = TensorForm(("s0", 8), (16, None), "float32", "cpu")
SILU = CallForm("piecework::silu_mul", (HALF, HALF), (("s0", 0, 64),))
NATIVE = ProviderOrder()
ATEN = ProviderOrder(default=("aten", "native"))


class Ran:
    """A body that notes what it was run on."""

    def __init__(self, form: CallForm = SILU, *, provider: str = "native", results: int = 1) -> None:
        self.inputs: list[list[Tensor]] = []
        self.results = results
        self.body = NativeBody(form, provider=provider, run=self.run)

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        self.inputs.append(inputs)
        return [torch.full((), 7.0)] * self.results

    @property
    def count(self) -> int:
        return len(self.inputs)


def halves(rows: int, **kwargs: Any) -> tuple[Tensor, ...]:
    return torch.randn(rows, 16, **kwargs).chunk(2, dim=-1)


@pytest.fixture
def ran() -> Iterator[Ran]:
    """Select a body of silu_mul for halves of 16 columns and up to 64 rows."""
    made = Ran()
    owner = object()
    entering(Selection(NATIVE, bodies=NativeBodies(NATIVE, [made.body]), owner=owner))
    yield made
    leaving(owner)


def bodies() -> NativeBodies:
    selection = current_selection()
    assert selection is not None
    assert selection.bodies is not None
    return selection.bodies


@pytest.mark.parametrize("rows", [0, 1, 3, 64])
def test_calls_of_the_form_run_the_body(ran: Ran, rows: int) -> None:
    gate, up = halves(rows)
    assert silu_mul(gate, up).item() == 7.0
    assert silu_mul(up=up, gate=gate).item() == 7.0
    assert [len(inputs) for inputs in ran.inputs] == [2, 2]
    assert all(inputs[0] is gate and inputs[1] is up for inputs in ran.inputs)
    assert not bodies().fallbacks


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (halves(65), "silu_mul(float32[*, 8], float32[*, 8])"),
        (halves(3, dtype=torch.float64), "silu_mul(float64[*, 8], float64[*, 8])"),
        ((torch.randn(3, 8), torch.randn(3, 8)), "silu_mul(float32[*, 8], float32[*, 8])"),
        ((halves(3)[0], halves(1)[0]), "silu_mul(float32[*, 8], float32[*, 8])"),
        ((torch.randn(3, 4), torch.randn(3, 4)), "silu_mul(float32[*, 4], float32[*, 4])"),
        ((torch.randn(1, 3, 8), torch.randn(1, 3, 8)), "silu_mul(float32[*, *, 8], float32[*, *, 8])"),
    ],
)
def test_other_calls_run_natively_and_are_counted(ran: Ran, given: tuple[Tensor, Tensor], kind: str) -> None:
    for _ in range(2):
        torch.testing.assert_close(silu_mul(*given), silu_mul.native(*given))
    assert ran.count == 0
    assert bodies().fallbacks == {kind: 2}


def test_the_layout_of_an_axis_of_one_element_does_not_matter(ran: Ran) -> None:
    assert silu_mul(torch.randn(1, 8), torch.randn(1, 8)).item() == 7.0


def test_a_wrong_call_fails_as_it_does_without_a_body(ran: Ran) -> None:
    gate, up = halves(2)
    with pytest.raises((TypeError, RuntimeError)):
        silu_mul(gate)
    with pytest.raises((TypeError, RuntimeError)):
        silu_mul(gate, up, up)
    with pytest.raises((TypeError, RuntimeError)):
        silu_mul(gate, up, wrong=1)


def test_constants_and_several_results() -> None:
    x = TensorForm(("s0", 8), (None, None), "float32", "cpu")
    fp8 = Ran(CallForm("piecework::quantize_dynamic_per_token", (x, {"dtype": "int8"}), (("s0", 0, 9),)), results=2)
    tanh = Ran(CallForm("piecework::gelu_mul", (x, x, "tanh"), (("s0", 0, 9),)))
    norm = Ran(CallForm("piecework::rms_norm", (x, None, 1e-6, 0.0, True), (("s0", 0, 9),)))
    y = torch.randn(3, 8)
    with torch.no_grad():
        Selection(NATIVE, bodies=NativeBodies(NATIVE, [fp8.body, tanh.body, norm.body])).running(
            lambda: (
                quantize_dynamic_per_token(y, torch.int8),
                quantize_dynamic_per_token(y),
                gelu_mul(y, y, "tanh"),
                gelu_mul(y, y),
                rms_norm(y),
                rms_norm(y, y[0]),
                rms_norm(y, eps=1e-5),
            )
        )
    assert (fp8.count, tanh.count, norm.count) == (1, 1, 1)


def test_sizes_that_are_one_size_must_agree() -> None:
    x = TensorForm(("s0", "s1", 8), (None, None, None), "float32", "cpu")
    made = Ran(CallForm("piecework::silu_mul", (x, x), (("s0", 0, 9), ("s1", 2, 9))))
    run = Selection(NATIVE, bodies=NativeBodies(NATIVE, [made.body])).running
    run(silu_mul, torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    assert made.count == 1
    run(silu_mul, torch.randn(2, 1, 8), torch.randn(2, 1, 8))
    run(silu_mul, torch.randn(2, 3, 8), torch.randn(1, 3, 8))
    assert made.count == 1


def test_never_where_something_else_than_computing_is_done(ran: Ran) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    gate, up = halves(3)
    with FakeTensorMode():
        assert silu_mul(*torch.empty(3, 16).chunk(2, dim=-1)).shape == (3, 8)
    graph = make_fx(lambda a, b: silu_mul(a, b))(gate, up).graph
    assert silu_mul.overload in [node.target for node in graph.nodes]
    torch.vmap(silu_mul)(gate, up)
    with piecework.check_ops():
        silu_mul(gate, up)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        silu_mul(gate, up)
    assert ran.count == 0
    assert not bodies().fallbacks


def test_where_computes_plainly_says_no() -> None:
    assert computes_plainly()
    seen = []
    torch.vmap(lambda x: (seen.append(computes_plainly()), x * 2)[1])(torch.ones(2))
    torch.jit.trace(lambda x: (seen.append(computes_plainly()), x * 2)[1], torch.ones(2), check_trace=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen.append(computes_plainly())
    with torch.utils._python_dispatch.TorchDispatchMode():
        seen.append(computes_plainly())
    assert seen == [False] * len(seen)
    assert len(seen) == 4
    assert computes_plainly()


def test_what_autograd_records_is_not_compiled(ran: Ran) -> None:
    gate, up = halves(3, requires_grad=True)
    assert silu_mul(gate, up).requires_grad
    with torch.no_grad():
        silu_mul(gate, up)
    assert ran.count == 1


def test_inside_torch_compile_the_body_is_traced_and_not_called(ran: Ran) -> None:
    gate, up = halves(3)
    compiled = torch.compile(lambda a, b: silu_mul(a, b) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(gate, up), silu_mul.native(gate, up) + 1)
    assert ran.count == 0


def test_nested_blocks_find_the_body_of_the_provider_they_choose(ran: Ran) -> None:
    gate, up = halves(3)
    other = ProviderOrder(per_op={"rms_norm": ("aten", "native")})
    with selecting(other), selecting(NATIVE), selecting(other):
        assert silu_mul(gate, up).item() == 7.0
    assert silu_mul(gate, up).item() == 7.0
    assert ran.count == 2


def test_a_nested_block_that_chooses_another_provider_gets_it() -> None:
    x = TensorForm(("s0", 8), (None, None), "float32", "cpu")
    made = Ran(CallForm("piecework::rms_norm", (x, None, 1e-6, 0.0, True), (("s0", 0, 9),)))
    owned = NativeBodies(NATIVE, [made.body])
    y = torch.randn(3, 8)

    def run() -> Tensor:
        with selecting(ATEN):
            return rms_norm(y)

    torch.testing.assert_close(Selection(NATIVE, bodies=owned).running(run), rms_norm.native(y))
    assert made.count == 0


def test_neither_threads_nor_tasks_see_each_others(ran: Ran) -> None:
    gate, up = halves(3)
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(silu_mul(gate, up).sum().item()))
    thread.start()
    thread.join()
    assert found[0] == pytest.approx(silu_mul.native(gate, up).sum().item())
    mine = Ran()

    async def other() -> float:
        owner = object()
        entering(Selection(NATIVE, bodies=NativeBodies(NATIVE, [mine.body]), owner=owner))
        await asyncio.sleep(0)
        result = silu_mul(gate, up).item()
        leaving(owner)
        return float(result)

    async def several() -> list[float]:
        return await asyncio.gather(*(other() for _ in range(3)))

    assert asyncio.run(several()) == [7.0] * 3
    assert (ran.count, mine.count) == (0, 3)
    assert silu_mul(gate, up).item() == 7.0


def test_blocks_are_left_from_the_innermost() -> None:
    first, second = object(), object()
    entering(Selection(NATIVE, owner=first))
    entering(Selection(ATEN, owner=second))
    with pytest.raises(OpError, match="another block, entered later, is still open"):
        leaving(first)
    leaving(second)
    leaving(first)
    with pytest.raises(OpError, match="none is open here"):
        leaving(first)
    assert current_selection() is None


def test_missing_bodies_are_made_once_whatever_the_number_of_threads() -> None:
    made: list[Ran] = []

    def make(op: Any, values: Any, choice: Any, order: Any) -> NativeBody:
        made.append(Ran(provider=choice.provider))
        return made[-1].body

    selection = Selection(NATIVE, bodies=NativeBodies(NATIVE, missing=make))
    gate, up = halves(3)
    start = threading.Barrier(4)

    def call() -> None:
        start.wait()
        for _ in range(5):
            selection.running(silu_mul, gate, up)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert made[0].count == 20
    with_rows = ProviderOrder.parse("silu_mul[1:4]=native")
    assert replace(selection, order=with_rows).running(silu_mul, gate, up).item() == 7.0, "the same provider's body"
    assert len(made) == 1


def test_what_is_called_while_a_body_is_made_asks_for_none() -> None:
    def make(op: Any, values: Any, choice: Any, order: Any) -> NativeBody:
        assert silu_mul(*(value.to("meta") for value in values)).is_meta
        silu_mul(*values)
        return Ran().body

    owned = NativeBodies(NATIVE, missing=make)
    selection = Selection(NATIVE, bodies=owned)
    assert selection.running(silu_mul, *halves(3)).item() == 7.0
    assert selection.running(silu_mul, *halves(3, device="meta")).is_meta
    assert owned.fallbacks == {}


def test_an_op_has_only_so_many_bodies() -> None:
    asked = []

    def make(op: Any, values: Any, choice: Any, order: Any) -> NativeBody | None:
        asked.append(values[0].shape[-1])
        width = values[0].shape[-1]
        x = TensorForm(("s0", width), (None, None), "float32", "cpu")
        return Ran(CallForm("piecework::silu_mul", (x, x), (("s0", 0, 9),))).body

    owned = NativeBodies(NATIVE, missing=make, most=3)
    run = Selection(NATIVE, bodies=owned).running
    for width in (1, 2, 3, 4, 4):
        run(silu_mul, torch.randn(2, width), torch.randn(2, width))
    assert asked == [1, 2, 3]
    assert owned.fallbacks == {"silu_mul(float32[*, 4], float32[*, 4])": 2}
    owned.clear()
    assert owned.bodies == ()
    run(silu_mul, torch.randn(2, 1), torch.randn(2, 1))
    assert asked == [1, 2, 3]


def test_a_body_may_be_a_providers_function_or_none() -> None:
    called = []
    function = NativeBody(SILU, provider="mine", function=lambda gate, up: (called.append(1), gate + up)[1])
    gate, up = halves(3)
    assert torch.equal(
        Selection(NATIVE, bodies=NativeBodies(NATIVE, [function])).running(silu_mul, gate, up), gate + up
    )
    assert called == [1]
    nothing = NativeBody(SILU, provider="native")
    assert nothing.call((gate, up)) is NOT_COMPILED
    assert not nothing.compiled


def test_forms_are_json() -> None:
    form = CallForm(
        "mine::op", (HALF, None, 2.5, {"dtype": "int8"}, TensorForm((8,), (None,), "bfloat16", "cpu")), (("s0", 1, 5),)
    )
    assert CallForm.from_json(form.to_json()) == form
    assert len({form, CallForm.from_json(form.to_json()), SILU}) == 2
    assert form.text() == "mine::op(float32[s0, 8], None, 2.5, int8, bfloat16[8])"
    assert HALF.spec().stride == (16, 1)
    assert TensorForm(("s0", "s1", 8), (None, None, None), "float32", "cpu").spec().stride == ("8*s1", 8, 1)
