"""Operators that take recurrent states as arguments: what they declare, and what they refuse to be traced with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from piecework import OpError
from piecework.ops.ir.opaque_op import OpaqueOp
from piecework.ops.states.causal_conv import causal_conv
from piecework.ops.states.delta_rule import delta_rule
from piecework.ops.states.mamba2_scan import mamba2_scan
from piecework.ops.states.selective_scan import selective_scan

# two that decode, one of them from its first token; a chunk with tokens before it, and one that begins
LENGTHS, NEW, SLOTS, NUM_DECODE = (5, 1, 7, 4), (1, 1, 3, 4), (4, 0, 2, 5), 2
TOKENS, NUM_SLOTS = sum(NEW), 6


@dataclass(frozen=True)
class Case:
    """An operator, and what makes its arguments before the batch's; the last of these is its state."""

    op: OpaqueOp
    make: Callable[[Callable[..., Tensor]], list[Tensor]]

    def args(self) -> list[Any]:
        generator = torch.Generator().manual_seed(3)
        given = self.make(lambda *shape: torch.randn(shape, generator=generator))
        starts = torch.tensor([0, *NEW]).cumsum(0)
        return [*given, torch.tensor(LENGTHS), starts, NUM_DECODE, torch.tensor(SLOTS)]


CASES = {
    "conv": Case(causal_conv, lambda r: [r(TOKENS, 6), r(6, 4), r(6), r(NUM_SLOTS, 6, 3)]),
    "delta": Case(
        delta_rule,
        lambda r: [
            *(r(TOKENS, heads, dim) for heads, dim in ((2, 8), (2, 8), (4, 6))),
            *(-(r(TOKENS, 4) ** 2), r(TOKENS, 4).sigmoid(), r(NUM_SLOTS, 4, 8, 6)),
        ],
    ),
    "channels": Case(
        selective_scan,
        lambda r: [
            *(r(TOKENS, 6), r(TOKENS, 6) ** 2, -(r(6, 5) ** 2)),
            *(r(TOKENS, 5), r(TOKENS, 5), r(NUM_SLOTS, 6, 5)),
        ],
    ),
    "scan": Case(
        mamba2_scan,
        lambda r: [r(TOKENS, 4, 6), -(r(TOKENS, 4) ** 2), r(TOKENS, 2, 5), r(TOKENS, 2, 5), r(NUM_SLOTS, 4, 6, 5)],
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def state_of(args: list[Any]) -> Tensor:
    state: Tensor = args[-5]
    return state


def test_they_do_what_they_declare_and_write_to_their_sequences_slots_only(case: Case) -> None:
    args = case.args()
    before = state_of(args).clone()
    out = case.op.check(*args)
    assert out.shape[0] == TOKENS
    changed = (state_of(args) != before).flatten(1).any(1)
    assert changed.tolist() == [slot in SLOTS for slot in range(NUM_SLOTS)]


def test_what_a_slot_held_matters_to_those_that_go_on_and_to_no_others(case: Case) -> None:
    first, second = case.args(), case.args()
    state_of(second).add_(1.0)
    same = (case.op(*first) - case.op(*second)).flatten(1).abs().amax(1) == 0
    began = [length == new for length, new in zip(LENGTHS, NEW, strict=True) for _ in range(new)]
    assert same.tolist() == began


@pytest.mark.parametrize("second_length", [1, 6])
def test_where_the_slots_are_makes_no_difference(case: Case, second_length: int) -> None:
    """Slots that follow one another are changed in place."""
    apart, together = case.args(), case.args()
    for args in (apart, together):
        args[-4] = torch.tensor([LENGTHS[0], second_length, *LENGTHS[2:]])
    slots = [2, 3, 5, 0]
    state_of(together)[slots] = state_of(apart)[list(SLOTS)]
    together[-1] = torch.tensor(slots)
    torch.testing.assert_close(case.op(*together), case.op(*apart))
    torch.testing.assert_close(state_of(together)[slots], state_of(apart)[list(SLOTS)])


def test_shapes_that_do_not_go_together_are_refused(case: Case) -> None:
    args = [a.to("meta") if isinstance(a, Tensor) else a for a in case.args()]
    assert case.op.results(*args).shape[0] == TOKENS
    for index, given in enumerate(args):
        if isinstance(given, Tensor) and index:
            with pytest.raises((OpError, ValueError)):
                case.op.results(*args[:index], given.unsqueeze(-1), *args[index + 1 :])
    for index in (len(args) - 1, len(args) - 4):
        with pytest.raises(OpError, match=r"\[5\] in place of \[4\]|\[4\] in place of \[5\]"):
            case.op.results(*args[:index], args[index].new_empty(5), *args[index + 1 :])
    with pytest.raises(OpError, match="int64"):
        case.op.results(*args[:-1], args[-1].int())


def test_heads_are_in_groups_of_the_same_size() -> None:
    for name, index, value in (("delta", (0, 1), 3), ("scan", (2, 3), 3)):
        args = [a.to("meta") if isinstance(a, Tensor) else a for a in CASES[name].args()]
        for at in index:
            args[at] = args[at].new_empty(TOKENS, value, args[at].shape[2])
        with pytest.raises(OpError, match="4 heads in 3 groups"):
            CASES[name].op.results(*args)
