"""Attention by layer name is `piecework::attention` on the cache of the running context."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from piecework import LayerName, OpError, check_ops
from piecework.ops.attention import attention_native
from piecework.ops.ir.forward_context import Batch, ForwardContext
from piecework.ops.layer_attention import AttentionState, kv_write, layer_attention
from tests.unit.ops.attention_cases import BATCHES, Case, make_case

LAYER = LayerName("model.layers.0.self_attn")


def batch_of(case: Case) -> Batch:
    return Batch(*case.args[4:])


def context_of(case: Case) -> ForwardContext:
    return ForwardContext({LAYER: AttentionState(case.args[3])})


def written_apart(query: Tensor, key: Tensor, value: Tensor, **options: float) -> Tensor:
    token = kv_write(key, value, LAYER)
    assert token.shape == (0,)
    return layer_attention(query, key, value, LAYER, **options, after=token)


def at_once(query: Tensor, key: Tensor, value: Tensor, **options: float) -> Tensor:
    return layer_attention(query, key, value, LAYER, **options)


@pytest.mark.parametrize("form", [at_once, written_apart])
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_attention_on_the_layers_cache(form, batch: str) -> None:
    case, twin = (make_case(BATCHES[batch], heads=4, kv_heads=2) for _ in range(2))
    options = {"scale": 0.3, "sliding_window": 4, "softcap": 1.5}
    with context_of(case).running(batch_of(case)), check_ops():
        out = form(*case.args[:3], **options)
    assert torch.equal(out, attention_native(*twin.args, **options))
    assert torch.equal(case.args[3], twin.args[3])


def test_after_a_token_nothing_is_written() -> None:
    case = make_case(BATCHES["mixed"], heads=4, kv_heads=2)
    before = case.args[3].clone()
    with context_of(case).running(batch_of(case)):
        layer_attention(*case.args[:3], LAYER, 0.3, after=torch.empty(0))
    assert torch.equal(case.args[3], before)


def test_two_engines_give_their_own_results_for_one_name() -> None:
    case, other = (make_case(BATCHES["decodes"], heads=4, kv_heads=2) for _ in range(2))
    other.args[3].mul_(2)
    twins = [Case(tuple(a.clone() if isinstance(a, Tensor) else a for a in c.args), []) for c in (case, other)]
    with context_of(case).running(batch_of(case)):
        first = at_once(*case.args[:3], scale=0.3)
        with context_of(other).running(batch_of(other)):
            second = at_once(*case.args[:3], scale=0.3)
        again = at_once(*case.args[:3], scale=0.3)
    assert torch.equal(first, attention_native(*twins[0].args, 0.3))
    assert torch.equal(second, attention_native(*twins[1].args, 0.3))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_layers_that_share_a_cache() -> None:
    case = make_case(BATCHES["mixed"], heads=4, kv_heads=2)
    state = AttentionState(case.args[3])
    context = ForwardContext({"layers.0": state, "layers.1": state})
    with context.running(batch_of(case)):
        first = layer_attention(*case.args[:3], LayerName("layers.0"), 0.3)
        second = layer_attention(*case.args[:3], LayerName("layers.1"), 0.3, after=torch.empty(0))
    assert torch.equal(first, second)


def test_outside_of_a_context() -> None:
    case = make_case(BATCHES["one decode"], heads=4, kv_heads=2)
    with pytest.raises(OpError, match="no context running"):
        at_once(*case.args[:3], scale=0.3)
    with ForwardContext({"other": 0}).running(batch_of(case)), pytest.raises(OpError, match="such as other"):
        at_once(*case.args[:3], scale=0.3)


@torch.no_grad()
@pytest.mark.parametrize("form", [at_once, written_apart])
def test_compiled(form) -> None:
    torch._dynamo.reset()
    case, twin = (make_case(BATCHES["mixed"], heads=4, kv_heads=2) for _ in range(2))
    compiled = torch.compile(lambda q, k, v: form(q, k * 1, v, scale=0.3) + 1, backend="aot_eager", fullgraph=True)
    with context_of(case).running(batch_of(case)):
        out = compiled(*case.args[:3])
    assert torch.equal(out, attention_native(*twin.args, scale=0.3) + 1)
    assert torch.equal(case.args[3], twin.args[3])


def test_both_are_told_their_layer() -> None:
    assert kv_write.layer_parameters == layer_attention.layer_parameters == ("layer",)
