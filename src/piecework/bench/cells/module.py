"""transformers' own module on our attention op, with real weights and KV caches: what piecework's peers run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from piecework.bench.cells.forward import StepTimes, decode_inputs, num_blocks, time_steps
from piecework.capture.request import CaptureRequest
from piecework.foundation.process import seconds_since_start
from piecework.models.adapter import build_causal_lm
from piecework.models.checkpoint import open_checkpoint
from piecework.spec.model_spec import ModelSpec


def build_module(model_dir: Path, *, max_tokens: int, blocks: int) -> CaptureRequest:
    """Return the adapter's request for a model directory, its module with weights and KV caches of `blocks` blocks.

    Weights are copied out of the mapped file, whose tensors are not aligned as torch's own are.
    """
    request = build_causal_lm(ModelSpec.of(model_dir, max_tokens=max_tokens))
    checkpoint = open_checkpoint(model_dir)
    module = request.module
    module.load_state_dict({name: checkpoint.get(name).clone() for name in checkpoint.names()}, assign=True)
    module.requires_grad_(False)
    sizes = {"blocks": blocks}
    for name, state in request.states.items():
        owner, _, attribute = name.rpartition(".")
        shape = [sizes[size] if isinstance(size, str) else size for size in state.shape]
        module.get_submodule(owner).register_buffer(
            attribute, torch.zeros(shape, dtype=getattr(torch, state.dtype)), persistent=False
        )
    return request


def first_step_and_times(
    model_dir: Path,
    *,
    max_tokens: int,
    batch: int,
    steps: int,
    seconds: float,
    prepare: Callable[[nn.Module], Any],
) -> dict[str, Any]:
    """Build the model, let `prepare` set up its compilation, run a decode step, and time more of them.

    Returns the cell's figures: "first_step_s" since the process began, and those of `StepTimes` where `steps` isn't 0.
    """
    request = build_module(model_dir, max_tokens=max_tokens, blocks=num_blocks(batch))
    module = prepare(request.module)
    inputs: Mapping[str, Any] = decode_inputs(batch)
    with torch.inference_mode():
        request.call(module, inputs)
        figures: dict[str, Any] = {"first_step_s": round(seconds_since_start(), 3)}
        if steps:
            times: StepTimes = time_steps(
                lambda: request.call(module, inputs), least_steps=steps, least_seconds=seconds
            )
            figures |= times.to_json()
    return figures
