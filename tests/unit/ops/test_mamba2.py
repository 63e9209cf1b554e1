"""The Mamba2 mixer against transformers' module, whole prompts against chunks and single steps."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

from piecework import LayerName, OpError, check_ops
from piecework.ops.ir.forward_context import ForwardContext
from piecework.ops.mixers.mamba2 import Mamba2State, Mamba2Weights, mamba2_mixer
from tests.unit.ops.schedules import LENGTHS, SCHEDULES, make_batch, run_schedule

LAYER = LayerName("backbone.layers.0.mixer")
SLOTS = (4, 1, 3)


def make_module(*, groups: int = 2, seed: int = 0, **options) -> Mamba2Mixer:
    config = Mamba2Config(
        hidden_size=16,
        num_heads=4,
        head_dim=8,
        state_size=6,
        n_groups=groups,
        chunk_size=4,
        num_hidden_layers=1,
        vocab_size=8,
        **options,
    )
    module = Mamba2Mixer(config, layer_idx=0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module


def make_state(module: Mamba2Mixer, *, num_slots: int = 5, **options) -> Mamba2State:
    """Return our form of a module, its states full of what another sequence might have left."""
    weights = Mamba2Weights(
        conv_weight=module.conv1d.weight.squeeze(1),
        conv_bias=module.conv1d.bias,
        dt_bias=module.dt_bias,
        a_log=module.A_log,
        d=module.D,
        norm_weight=module.norm.weight,
        norm_eps=module.norm.variance_epsilon,
        norm_group_size=module.norm.group_size,
        time_step_limit=module.time_step_limit,
        **{"chunk_size": 4, **options},
    )
    channels, taps = weights.conv_weight.shape
    return Mamba2State(
        weights,
        conv_state=torch.full((num_slots, channels, taps - 1), float("nan")),
        ssm_state=torch.full((num_slots, module.num_heads, module.head_dim, module.ssm_state_size), float("nan")),
    )


@pytest.fixture(scope="module")
def inputs() -> list[Tensor]:
    return list(torch.randn(sum(LENGTHS), 16, generator=torch.Generator().manual_seed(1)).split(LENGTHS))


def run_all(module: nn.Module, state: Mamba2State, inputs: list[Tensor], schedule: str) -> list[Tensor]:
    context = ForwardContext({LAYER: state})

    def run(batch, tokens):
        hidden = torch.stack([inputs[s][i] for s, i in tokens.tolist()])
        with context.running(batch), check_ops():
            return module.out_proj(mamba2_mixer(module.in_proj(hidden), LAYER, module.intermediate_size))

    return run_schedule(schedule, run, slots=SLOTS)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("groups", [1, 2])
def test_equals_transformers_on_the_whole_sequence(inputs: list[Tensor], schedule: str, groups: int) -> None:
    module = make_module(groups=groups)
    outs = run_all(module, make_state(module), inputs, schedule)
    for out, sequence in zip(outs, inputs, strict=True):
        torch.testing.assert_close(out, module(sequence.unsqueeze(0)).squeeze(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["whole prompts", "prompts, then decode"])
def test_without_biases_and_with_limited_time_steps(inputs: list[Tensor], schedule: str) -> None:
    module = make_module(use_conv_bias=False, time_step_limit=(0.3, 0.9))
    outs = run_all(module, make_state(module), inputs, schedule)
    for out, sequence in zip(outs, inputs, strict=True):
        torch.testing.assert_close(out, module(sequence.unsqueeze(0)).squeeze(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 3, 11, 256])
def test_the_chunk_size_changes_rounding_only(inputs: list[Tensor], chunk_size: int) -> None:
    module = make_module()
    expected = run_all(module, make_state(module), inputs, "whole prompts")
    outs = run_all(module, make_state(module, chunk_size=chunk_size), inputs, "whole prompts")
    for out, other in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, other, atol=1e-5, rtol=1e-5)


def test_states_are_those_of_the_sequences_and_no_others(inputs: list[Tensor]) -> None:
    module = make_module()
    states = [make_state(module) for _ in range(2)]
    run_all(module, states[0], inputs, "whole prompts")
    run_all(module, states[1], inputs, "decode from the first token")
    unused = [i for i in range(5) if i not in SLOTS]
    for name in ("conv_state", "ssm_state"):
        first, second = (getattr(s, name) for s in states)
        torch.testing.assert_close(first[list(SLOTS)], second[list(SLOTS)], atol=1e-5, rtol=1e-5)
        assert first[unused].isnan().all()
        assert second[unused].isnan().all()


def test_long_decays_stay_finite() -> None:
    module = make_module()
    module.A_log.fill_(6.0)
    state = make_state(module, chunk_size=64)
    hidden = torch.randn(100, 16, generator=torch.Generator().manual_seed(2))
    with ForwardContext({LAYER: state}).running(make_batch([(100, 100)], [0], 0)):
        out = mamba2_mixer(module.in_proj(hidden), LAYER, module.intermediate_size)
    assert out.isfinite().all()
    torch.testing.assert_close(module.out_proj(out), module(hidden.unsqueeze(0)).squeeze(0), atol=1e-4, rtol=1e-4)


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
    projected = modules[0].in_proj(inputs[0])
    contexts = [ForwardContext({LAYER: make_state(m)}) for m in modules]
    outs = []
    for context in contexts:
        with context.running(batch):
            outs.append(mamba2_mixer(projected, LAYER, 32))
    assert not torch.allclose(*outs)
    with ForwardContext({LAYER: make_state(modules[0])}).running(batch):
        assert torch.equal(mamba2_mixer(projected, LAYER, 32), outs[0])


def test_compiled(inputs: list[Tensor]) -> None:
    torch._dynamo.reset()
    module = make_module()

    def forward(hidden: Tensor) -> Tensor:
        return module.out_proj(mamba2_mixer(module.in_proj(hidden), LAYER, module.intermediate_size))

    batch = make_batch([(11, 11)], [2], 0)
    outs = []
    for run in (forward, torch.compile(forward, backend="aot_eager", fullgraph=True)):
        with ForwardContext({LAYER: make_state(module)}).running(batch), torch.no_grad():
            outs.append(run(inputs[0]))
    assert torch.equal(*outs)


def test_what_is_missing_or_does_not_fit(inputs: list[Tensor]) -> None:
    module = make_module()
    projected = module.in_proj(inputs[0])
    batch = make_batch([(11, 11)], [2], 0)
    context = ForwardContext({LAYER: make_state(module)})
    with context.running(dataclasses.replace(batch, state_slots=None)), pytest.raises(OpError, match="state_slots"):
        mamba2_mixer(projected, LAYER, 32)
    with context.running(batch), pytest.raises(OpError, match="inner_size = 31"):
        mamba2_mixer(projected, LAYER, 31)
    with pytest.raises(OpError, match="no context running"):
        mamba2_mixer(projected, LAYER, 32)
