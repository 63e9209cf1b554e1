"""The Mamba mixer against transformers' modules, in every schedule of prompts, chunks and single steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.jamba.modeling_jamba import JambaConfig, JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

from piecework import LayerName, OpError, check_ops
from piecework.ops.ir.forward_context import ForwardContext
from piecework.ops.mixers.mamba import MambaState, MambaWeights, mamba_mixer
from tests.unit.ops.schedules import LENGTHS, SCHEDULES, make_batch, run_schedule

LAYER = LayerName("backbone.layers.0.mixer")
SLOTS = (4, 1, 3)
SIZES = {"hidden_size": 16, "state_size": 6, "mamba_d_state": 6, "num_hidden_layers": 1, "vocab_size": 8}


def make_module(mixer: type[nn.Module], config: type, **options) -> nn.Module:
    module = mixer(config(**SIZES, **options), layer_idx=0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module


def make_state(module: nn.Module) -> MambaState:
    """Return our form of a module, its states full of what another sequence might have left."""
    jamba = isinstance(module, JambaMambaMixer)
    weights = MambaWeights(
        conv_weight=module.conv1d.weight.squeeze(1),
        conv_bias=module.conv1d.bias,
        x_proj=module.x_proj.weight,
        dt_proj=module.dt_proj.weight,
        dt_bias=module.dt_proj.bias,
        a_log=module.A_log,
        d=module.D,
        norms=tuple(getattr(module, f"{name}_layernorm").weight for name in ("dt", "b", "c")) if jamba else None,
        norm_eps=0.1,
    )
    channels, taps = weights.conv_weight.shape
    empty = torch.full((5, channels, taps - 1), float("nan")), torch.full((5, channels, 6), float("nan"))
    return MambaState(weights, *empty)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "module",
    [
        make_module(MambaMixer, MambaConfig),
        make_module(MambaMixer, MambaConfig, use_conv_bias=False),
        make_module(JambaMambaMixer, JambaConfig, rms_norm_eps=0.1),
    ],
    ids=["Mamba", "no bias", "Jamba"],
)
def test_equals_transformers_on_the_whole_sequence(module: nn.Module, schedule: str) -> None:
    inputs = torch.randn(sum(LENGTHS), 16, generator=torch.Generator().manual_seed(1)).split(LENGTHS)
    context = ForwardContext({LAYER: make_state(module)})

    def run(batch, tokens) -> Tensor:
        hidden = torch.stack([inputs[s][i] for s, i in tokens.tolist()])
        with context.running(batch), check_ops():
            return module.out_proj(mamba_mixer(module.in_proj(hidden), LAYER, module.intermediate_size))

    for out, sequence in zip(run_schedule(schedule, run, slots=SLOTS), inputs, strict=True):
        torch.testing.assert_close(out, module(sequence.unsqueeze(0)).squeeze(0), atol=1e-4, rtol=1e-4)


def test_another_size_is_refused() -> None:
    context = ForwardContext({LAYER: make_state(make_module(MambaMixer, MambaConfig))})
    with context.running(make_batch([(3, 3)], [0], 0)), pytest.raises(OpError, match="inner_size = 31"):
        mamba_mixer(torch.ones(3, 62), LAYER, 31)
