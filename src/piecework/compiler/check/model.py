"""Run a language model's bundle beside its module on piecework's ops: prompts, decoding and both, from one token on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from piecework.bundle.bundle import Bundle
from piecework.bundle.plan import Recipe
from piecework.bundle.run.constants import TensorSource, make_constants
from piecework.bundle.run.loading import load
from piecework.bundle.sizes import size_expression
from piecework.capture.general import Called
from piecework.capture.request import CaptureRequest
from piecework.compiler.check.results import Checked, compared
from piecework.models.adapter import build_causal_lm
from piecework.models.batch import STATE_SLOTS
from piecework.models.sample_batches import Batch, batch_inputs
from piecework.spec.model_spec import ModelSpec

_LONGEST: Final = 512
_MOST_DECODE: Final = 32
_SEED: Final = 20


def check_model(spec: ModelSpec, bundle: Bundle, *, weights: TensorSource) -> Checked:
    """Compare the logits of a bundle with those of the module that it was compiled of, on random tokens and caches.

    Batches have from 1 to 512 tokens, where the bundle takes as many. Raises CheckError where logits differ by more
    than `TOLERANCES`, CorruptBundle, WeightsError, CapacityError.
    """
    request = build_causal_lm(spec)
    model = load(bundle, weights=weights, check_facts=False)
    named = _named_weights(request, weights)
    tried, worst = [], 0.0
    for batch in _batches(spec):
        blocks = {"blocks": batch.num_blocks, STATE_SLOTS: batch.num_seqs}
        states = _random_states(request, blocks)
        model.make_states(blocks)
        for name, state in model.states.items():
            state.copy_(states[name])
        given = batch_inputs(batch)
        generator = torch.Generator().manual_seed(_SEED)
        given["input_ids"] = torch.randint(spec.config.vocab_size, (batch.num_tokens,), generator=generator)
        wanted = _eager(request, {**named, **states}, given)  # which writes to the states
        found = model.run({name: given[name] for name in model.plan_inputs})
        worst = max(worst, *compared(["logits"], wanted, found, where=str(batch)).values())
        tried.append(str(batch))
    return Checked(tuple(tried), {"logits": worst})


def _batches(spec: ModelSpec) -> Iterator[Batch]:
    """Yield a batch of the fewest tokens and of many, of each kind."""
    longest = min(spec.max_tokens, spec.config.max_positions, _LONGEST)
    decode, context = min(longest, _MOST_DECODE), min(37, spec.config.max_positions - 1)
    yield Batch(prompts=1, prompt_tokens=1)
    yield Batch(prompts=1, prompt_tokens=longest)
    yield Batch(decode=1, decode_context=context)
    yield Batch(decode=decode, decode_context=context)
    if longest > 7:
        yield Batch(decode=2, decode_context=context, prompts=1, prompt_tokens=min(9, longest - 2))


def _named_weights(request: CaptureRequest, weights: TensorSource) -> dict[str, Tensor]:
    """Return a module's parameters and buffers by name; what a checkpoint has is from `weights`."""
    buffers = {name: b for name, b in request.module.named_buffers() if name not in request.states}
    wanted = {**dict(request.module.named_parameters()), **{n: b for n, b in buffers.items() if n in request.sources}}
    recipes = [
        Recipe(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), source=request.sources.get(name))
        for name, t in wanted.items()
    ]
    made = make_constants(recipes, source=weights, literals={}, device=request.device)
    return {**buffers, **dict(zip(wanted, made, strict=True))}


def _random_states(request: CaptureRequest, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Return caches of random numbers; those of bytes hold zeros."""
    generator = torch.Generator().manual_seed(_SEED)
    made = {}
    for name, state in request.states.items():
        shape, dtype = [size_expression(str(d))(sizes) for d in state.shape], getattr(torch, state.dtype)
        values = torch.randn(shape, generator=generator) if dtype.is_floating_point else torch.zeros(shape)
        made[name] = values.to(request.device, dtype)
    return made


def _eager(request: CaptureRequest, named: Mapping[str, Tensor], given: Mapping[str, Any]) -> list[Tensor]:
    values = {i.name: given[i.name] for i in request.inputs}
    values = {name: v.to(request.device) if isinstance(v, Tensor) else v for name, v in values.items()}
    with torch.no_grad():
        made = torch.func.functional_call(Called(request), {f"module.{n}": t for n, t in named.items()}, (values,))
        found: list[Tensor] = made
        return found
