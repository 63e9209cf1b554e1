"""Orders of providers: which list applies, why others were not taken, and that blocks don't reach other threads."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import piecework
from piecework.errors import OpError
from piecework.ops.ir.provider_order import ProviderOrder, RangeRule, as_order
from piecework.ops.ir.selection import CallFacts, choose_implementation, current_selection
from piecework.ops.norms import rms_norm
from piecework.providers.discovery import load_providers

load_providers(["aten"])
ATEN = ProviderOrder(default=("aten", "native"))
X = torch.randn(3, 8)


def test_the_default_is_native() -> None:
    assert choose_implementation(ProviderOrder(), rms_norm, (X,)).provider == "native"
    assert current_selection() is None


def test_the_most_specific_list_applies() -> None:
    order = ProviderOrder.parse(["aten,native", "rms_norm=native", "rms_norm[2:4]=aten", "@cuda=triton,native"])
    assert choose_implementation(order, rms_norm, (X,)).provider == "aten"
    assert choose_implementation(order, rms_norm, (torch.randn(5, 8),)).provider == "native"
    assert choose_implementation(order, rms_norm, (torch.randn(2, 2, 8),)).provider == "aten", (
        "rows are those of all leading axes"
    )
    assert choose_implementation(ProviderOrder.parse("@cpu=aten;native"), rms_norm, (X,)).provider == "aten"
    assert choose_implementation(ProviderOrder.parse("@cuda=aten;native"), rms_norm, (X,)).provider == "native"


def test_a_range_that_covers_a_part_of_a_symbolic_size_is_told() -> None:
    order = ProviderOrder.parse(["rms_norm[1:64]=aten,native"])
    facts = CallFacts(rows=(1, 2048), inside=True)
    choice = choose_implementation(order, rms_norm, (X,), facts=facts)
    assert choice.provider == "native"
    assert choice.rejected[0].why == "asked for 1 to 64 rows, the call may have 1 to 2048"


def test_each_provider_that_is_not_taken_has_a_reason() -> None:
    order = ProviderOrder(default=("missing", "aten", "native"))
    absent = {"missing": "not installed"}
    choice = choose_implementation(
        order, rms_norm, (X.bfloat16(), torch.ones(8, dtype=torch.bfloat16)), facts=CallFacts(absent=absent)
    )
    assert choice.provider == "native"
    assert [(r.provider, r.why) for r in choice.rejected] == [
        ("missing", "not installed"),
        ("aten", "supports() said: torch.rms_norm rounds after the weight, the call to bfloat16 before it"),
    ]
    taken = choose_implementation(order, rms_norm, (X,))
    assert taken.provider == "aten"
    assert [(r.provider, r.why) for r in taken.rejected] == [
        ("missing", "it has no implementation of rms_norm"),
        ("native", "aten comes before it"),
    ]
    assert ("aten", "not in the order of providers") in [
        (r.provider, r.why) for r in choose_implementation(ProviderOrder(), rms_norm, (X,)).rejected
    ]


def test_an_order_without_native_may_leave_nothing() -> None:
    with pytest.raises(OpError, match=r"rms_norm=aten,native"):
        choose_implementation(ProviderOrder(default=("aten",)), rms_norm, (X, torch.ones(8), 1e-6, 1.0))


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        (["rms_nrom=native"], "no op of that name"),
        (["rms_norm"], ""),
        (["rms_norm="], "an empty list"),
        (["a,a"], "one twice"),
        (["rms_norm[4:2]=native"], "an empty range"),
        (["rms_norm[1:8]=native", "rms_norm[8:9]=aten"], "others for"),
        (["rms_norm=a b"], "no name"),
        (["rms_norm{1}=native"], "no rule of that form"),
        ([""], "an empty list"),
    ],
)
def test_what_is_no_rule(rules: list[str], found: str) -> None:
    if rules == ["rms_norm"]:
        assert ProviderOrder.parse(rules).default == ("rms_norm",), "any word may be a provider"
        return
    with pytest.raises(OpError, match=found):
        ProviderOrder.parse(rules)


_NAMES = st.lists(st.sampled_from(["native", "aten", "triton", "mine"]), min_size=1, max_size=3, unique=True).map(tuple)
_OPS = st.sampled_from(["rms_norm", "silu_mul", "mylib::thing", "piecework::rotary"])


@given(
    st.builds(
        ProviderOrder,
        default=_NAMES,
        per_op=st.dictionaries(_OPS, _NAMES),
        ranges=st.lists(_NAMES, max_size=3).map(
            lambda lists: tuple(RangeRule("rms_norm", 10 * i, 10 * i + 5, names) for i, names in enumerate(lists))
        ),
        per_device=st.dictionaries(st.sampled_from(["cpu", "cuda"]), _NAMES),
    )
)
def test_an_orders_text_is_read_back(order: ProviderOrder) -> None:
    again = ProviderOrder.from_json(order.to_json())
    assert again == order
    assert hash(again) == hash(order)
    assert as_order(order.text()) == order


def test_nested_blocks_restore() -> None:
    native = ProviderOrder()
    with piecework.providers(ATEN) as outer:
        assert outer is ATEN
        with piecework.providers("native"):
            assert current_selection().order == native  # type: ignore[union-attr]
            with pytest.raises(ZeroDivisionError), piecework.providers(ATEN):
                raise ZeroDivisionError
            assert current_selection().order == native  # type: ignore[union-attr]
        assert current_selection().order is ATEN  # type: ignore[union-attr]
    assert current_selection() is None


def test_a_call_goes_by_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    real = torch.rms_norm
    monkeypatch.setattr(torch, "rms_norm", lambda *args: called.append(1) or real(*args))
    rms_norm(X)
    assert not called
    with piecework.providers(["rms_norm=aten,native"]):
        rms_norm(X)
    assert called == [1]


def test_threads_do_not_share_a_block() -> None:
    seen: list[object] = []
    with piecework.providers(ATEN):
        thread = threading.Thread(target=lambda: seen.append(current_selection()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_tasks_do_not_share_a_block() -> None:
    async def selects(order: ProviderOrder, inside: asyncio.Barrier) -> ProviderOrder:
        with piecework.providers(order):
            await inside.wait()
            found = current_selection()
            await inside.wait()
        assert found is not None
        assert current_selection() is None
        return found.order

    async def both() -> list[ProviderOrder]:
        barrier = asyncio.Barrier(2)
        return await asyncio.gather(selects(ATEN, barrier), selects(ProviderOrder(), barrier))

    assert asyncio.run(both()) == [ATEN, ProviderOrder()]


def test_the_package_stays_a_package() -> None:
    from piecework.providers import libraries

    assert libraries.KERNELS
    assert piecework.providers.libraries is libraries
