"""The gated delta net against transformers' module and recurrence, whole prompts against chunks and single steps."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextConfig,
    Qwen3NextGatedDeltaNet,
    torch_recurrent_gated_delta_rule,
)

from piecework import LayerName, OpError, check_ops
from piecework.ops.ir.forward_context import ForwardContext
from piecework.ops.mixers.gated_delta_net import GatedDeltaNetState, GatedDeltaNetWeights, gated_delta_net
from tests.choice import one_in
from tests.unit.ops.schedules import LENGTHS, SCHEDULES, make_batch, run_schedule

LAYER = LayerName("model.layers.0.linear_attn")
SLOTS = (4, 1, 3)


def make_module(*, key_heads: int = 2, seed: int = 0) -> Qwen3NextGatedDeltaNet:
    config = Qwen3NextConfig(
        hidden_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=key_heads,
        linear_key_head_dim=8,
        linear_value_head_dim=6,
        num_hidden_layers=1,
    )
    module = Qwen3NextGatedDeltaNet(config, layer_idx=0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module


def make_state(module: Qwen3NextGatedDeltaNet, *, num_slots: int = 5, chunk_size: int = 4) -> GatedDeltaNetState:
    """Return our form of a module, its states full of what another sequence might have left."""
    weights = GatedDeltaNetWeights(
        conv_weight=module.conv1d.weight.squeeze(1),
        conv_bias=module.conv1d.bias,
        dt_bias=module.dt_bias,
        a_log=module.A_log,
        chunk_size=chunk_size,
    )
    channels, taps = weights.conv_weight.shape
    shape = (num_slots, module.num_v_heads, module.head_k_dim, module.head_v_dim)
    return GatedDeltaNetState(
        weights,
        conv_state=torch.full((num_slots, channels, taps - 1), float("nan")),
        recurrent_state=torch.full(shape, float("nan")),
    )


def project(module: Qwen3NextGatedDeltaNet, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mixed_qkv, b, a, as the operator takes them, and the norm's gate."""
    hidden = hidden.unsqueeze(0)
    query, key, value, z, b, a = module.fix_query_key_value_ordering(
        module.in_proj_qkvz(hidden), module.in_proj_ba(hidden)
    )
    mixed = torch.cat([t.flatten(2) for t in (query, key, value)], dim=-1)
    return mixed.squeeze(0), b.squeeze(0), a.squeeze(0), z.squeeze(0)


def forward(module: Qwen3NextGatedDeltaNet, hidden: Tensor) -> Tensor:
    mixed, b, a, z = project(module, hidden)
    core = gated_delta_net(mixed, b, a, LAYER, module.head_v_dim)
    return module.out_proj(module.norm(core.flatten(0, 1), z.flatten(0, 1)).view(hidden.shape[0], -1))


@pytest.fixture(scope="module")
def inputs() -> list[Tensor]:
    return list(torch.randn(sum(LENGTHS), 16, generator=torch.Generator().manual_seed(1)).split(LENGTHS))


def run_all(module, state: GatedDeltaNetState, inputs: list[Tensor], schedule: str) -> list[Tensor]:
    context = ForwardContext({LAYER: state})

    def run(batch, tokens):
        hidden = torch.stack([inputs[s][i] for s, i in tokens.tolist()])
        with context.running(batch), check_ops():
            return forward(module, hidden)

    return run_schedule(schedule, run, slots=SLOTS)


@pytest.mark.parametrize(("schedule", "key_heads"), one_in(3, SCHEDULES, [1, 2, 4]))
def test_equals_transformers_on_the_whole_sequence(inputs: list[Tensor], schedule: str, key_heads: int) -> None:
    module = make_module(key_heads=key_heads)
    outs = run_all(module, make_state(module), inputs, schedule)
    for out, sequence in zip(outs, inputs, strict=True):
        torch.testing.assert_close(out, module(sequence.unsqueeze(0)).squeeze(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_equals_the_recurrence_token_by_token(chunk_size: int) -> None:
    """Over many tokens, where states have faded and been corrected often; no convolution but its own tap."""
    generator = torch.Generator().manual_seed(3)
    num_tokens, heads, key_dim, value_dim = 150, 3, 8, 5
    q, k = torch.randn(2, num_tokens, heads, key_dim, generator=generator)
    v = torch.randn(num_tokens, heads, value_dim, generator=generator)
    b, a = torch.randn(2, num_tokens, heads, generator=generator)
    a_log, dt_bias = torch.randn(2, heads, generator=generator)
    mixed = torch.cat([t.flatten(1) for t in (q, k, v)], dim=-1)
    weights = GatedDeltaNetWeights(torch.ones(mixed.shape[1], 1), None, dt_bias, a_log, chunk_size)
    state = GatedDeltaNetState(weights, torch.empty(1, mixed.shape[1], 0), torch.zeros(1, heads, key_dim, value_dim))
    silu = torch.nn.functional.silu
    expected, last = torch_recurrent_gated_delta_rule(
        *(silu(t).unsqueeze(0) for t in (q, k, v)),
        g=(-a_log.exp() * torch.nn.functional.softplus(a + dt_bias)).unsqueeze(0),
        beta=b.sigmoid().unsqueeze(0),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    with ForwardContext({LAYER: state}).running(make_batch([(num_tokens, num_tokens)], [0], 0)):
        out = gated_delta_net(mixed, b, a, LAYER, value_dim)
    torch.testing.assert_close(out, expected.squeeze(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.recurrent_state, last, atol=1e-5, rtol=1e-4)


def test_states_are_those_of_the_sequences_and_no_others(inputs: list[Tensor]) -> None:
    module = make_module()
    states = [make_state(module) for _ in range(2)]
    run_all(module, states[0], inputs, "whole prompts")
    run_all(module, states[1], inputs, "decode from the first token")
    unused = [i for i in range(5) if i not in SLOTS]
    for name in ("conv_state", "recurrent_state"):
        first, second = (getattr(s, name) for s in states)
        torch.testing.assert_close(first[list(SLOTS)], second[list(SLOTS)], atol=1e-5, rtol=1e-5)
        assert first[unused].isnan().all()
        assert second[unused].isnan().all()


def test_strong_decays_stay_finite() -> None:
    module = make_module()
    module.A_log.fill_(6.0)
    hidden = torch.randn(100, 16, generator=torch.Generator().manual_seed(2))
    with ForwardContext({LAYER: make_state(module, chunk_size=64)}).running(make_batch([(100, 100)], [0], 0)):
        out = forward(module, hidden)
    assert out.isfinite().all()


def test_bfloat16_is_as_close_as_its_rounding(inputs: list[Tensor]) -> None:
    module = make_module()
    expected = run_all(module, make_state(module), inputs, "mixed")
    half = copy.deepcopy(module).bfloat16()
    state = dataclasses.replace(make_state(half), conv_state=make_state(half).conv_state.bfloat16())
    outs = run_all(half, state, [i.bfloat16() for i in inputs], "mixed")
    for out, other in zip(outs, expected, strict=True):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), other, atol=0.1, rtol=0.05)


def test_two_engines_give_their_own_results_for_one_name(inputs: list[Tensor]) -> None:
    modules = [make_module(seed=s) for s in (0, 1)]
    batch = make_batch([(11, 11)], [2], 0)
    mixed, b, a, _ = project(modules[0], inputs[0])
    outs = []
    for module in modules:
        with ForwardContext({LAYER: make_state(module)}).running(batch):
            outs.append(gated_delta_net(mixed, b, a, LAYER, 6))
    assert not torch.allclose(*outs)
    with ForwardContext({LAYER: make_state(modules[0])}).running(batch):
        assert torch.equal(gated_delta_net(mixed, b, a, LAYER, 6), outs[0])


def test_compiled(inputs: list[Tensor]) -> None:
    torch._dynamo.reset()
    module = make_module()
    batch = make_batch([(11, 11)], [2], 0)
    compiled = torch.compile(lambda hidden: forward(module, hidden), backend="aot_eager", fullgraph=True)
    outs = []
    for run in (lambda hidden: forward(module, hidden), compiled):
        with ForwardContext({LAYER: make_state(module)}).running(batch), torch.no_grad():
            outs.append(run(inputs[0]))
    torch.testing.assert_close(*outs)


def test_what_is_missing_or_does_not_fit(inputs: list[Tensor]) -> None:
    module = make_module()
    mixed, b, a, _ = project(module, inputs[0])
    batch = make_batch([(11, 11)], [2], 0)
    context = ForwardContext({LAYER: make_state(module)})
    with context.running(dataclasses.replace(batch, state_slots=None)), pytest.raises(OpError, match="state_slots"):
        gated_delta_net(mixed, b, a, LAYER, 6)
    with context.running(batch), pytest.raises(OpError, match="head_dim = 5"):
        gated_delta_net(mixed, b, a, LAYER, 5)
