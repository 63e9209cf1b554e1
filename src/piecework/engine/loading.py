"""From a bundle to an engine: its weights, how many blocks its KV cache has, and the seconds that each phase took."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from piecework.bundle.bundle import Bundle
from piecework.bundle.check_plan import lie
from piecework.bundle.plan import Plan
from piecework.bundle.recipes import castable, stored_takes
from piecework.bundle.run import LoadedModel, load
from piecework.bundle.run.loading import read_plan
from piecework.engine.block_pool import DEFAULT_BLOCK_SIZE, num_blocks_for
from piecework.engine.engine import Engine, EngineConfig, Runner, engine_for
from piecework.engine.events import Note, OnEvent, Phase, phase
from piecework.engine.kv_memory import (
    DEFAULT_FRACTION,
    has_slots,
    memory_needs,
    num_blocks_in,
    num_blocks_of_bytes,
    read_memory,
)
from piecework.engine.options import EngineOptions
from piecework.engine.text.tokenizer import Tokenizer
from piecework.errors import RequestError
from piecework.foundation.cpus import read_cpus
from piecework.foundation.environment import threads_given
from piecework.foundation.process import seconds_since_start
from piecework.models.checkpoint import Checkpoint, TensorMeta, open_checkpoint, random_checkpoint
from piecework.models.weight_check import wanted_by
from piecework.spec.config import ModelConfig
from piecework.spec.model_spec import ModelSpec


@dataclass(frozen=True)
class Loaded:
    """A model with its weights, and how many blocks its KV cache shall have; an encoder has none."""

    model: LoadedModel
    num_blocks: int


def load_model(bundle: Bundle, spec: ModelSpec, options: EngineOptions, *, on_event: OnEvent) -> Loaded:
    """Load a bundle whose facts were checked, and report the phases.

    Free memory is read before anything is loaded, so that the KV cache is the same however the bundle came to be.

    Raises CorruptBundle, WeightsError, CapacityError.
    """
    _use_threads(options.threads)
    plan = read_plan(bundle)
    if spec.config.encoder is None:
        _check_model_plan(plan)
        num_blocks = num_blocks_for_cache(plan, spec, options)
    else:
        _check_encoder_plan(plan)
        num_blocks = 0
    at = seconds_since_start()
    weights = open_weights(spec, plan, random_seed=options.random_weights)
    model = load(bundle, weights=weights, check_facts=False)
    for name, seconds in model.record.phases.items():  # they came one after the other
        if name != "verify":
            on_event(Phase(name, at, at + seconds))
            at += seconds
    return Loaded(model, num_blocks)


def _use_threads(num: int | None) -> None:
    """Have this process compute with so many threads; None lowers what torch would use to what this machine gives."""
    usual = torch.get_num_threads()
    default = usual if threads_given() else min(usual, read_cpus().threads)
    if (num or default) != usual:
        torch.set_num_threads(num or default)


def make_engine(
    loaded: Loaded, spec: ModelSpec, options: EngineOptions, *, tokenizer: Tokenizer | None, on_event: OnEvent
) -> Engine:
    """Return an engine for a loaded model; its KV cache is allocated here. Raises CapacityError."""
    plan = loaded.model.plan
    recurrent = any(has_slots(state) for state in plan.states)
    if recurrent and options.prefix_caching:
        on_event(Note("the model has recurrent states, which are not kept for prefixes: each prompt is read whole"))
    config = EngineConfig(
        num_blocks=loaded.num_blocks,
        max_tokens=plan.sizes["tokens"][1],
        max_seqs=_max_seqs(plan, options),
        prefix_caching=options.prefix_caching and not recurrent,
    )
    runner: Runner = loaded.model
    if options.profile is not None:
        from piecework.engine.profiling import profiled  # noqa: PLC0415  a start without a profile doesn't pay for it

        runner = profiled(loaded.model, options.profile, on_note=lambda text: on_event(Note(text)))
    with phase("KV cache", on_event=on_event):
        return engine_for(
            runner, config, model_config=_shortened(spec.config, options.max_model_len), tokenizer=tokenizer
        )


def _shortened(config: ModelConfig, most: int | None) -> ModelConfig:
    """Return a config whose sequences are at most so long; raises RequestError where the model's can't be."""
    if most is not None and most > config.max_positions:
        raise RequestError(
            asked=f"sequences of up to {most} tokens",
            found=f"the model's positions are made for {config.max_positions}",
            try_=f"--max-model-len {config.max_positions} or less",
        )
    return config if most is None else replace(config, max_positions=most)


def num_blocks_for_cache(plan: Plan, spec: ModelSpec, options: EngineOptions) -> int:
    """Return the blocks of a KV cache of the size asked for; raises CapacityError where there is no room for any."""
    if options.kv_cache_tokens is not None:
        longest = min(options.kv_cache_tokens, spec.config.max_positions)
        return num_blocks_for(longest, block_size=DEFAULT_BLOCK_SIZE)
    needs = memory_needs(plan, spec.config, max_seqs=_max_seqs(plan, options))
    if not needs.block:  # recurrent states only: blocks cost nothing
        return num_blocks_for(spec.config.max_positions, block_size=DEFAULT_BLOCK_SIZE) * _max_seqs(plan, options)
    if options.kv_cache_memory is not None:
        return num_blocks_of_bytes(options.kv_cache_memory, needs)
    device = spec.options.device
    fraction = DEFAULT_FRACTION[device] if options.memory_fraction is None else options.memory_fraction
    return num_blocks_in(read_memory(device), needs, fraction=fraction)


def _max_seqs(plan: Plan, options: EngineOptions) -> int:
    """Return the most sequences that run at the same time."""
    most = plan.sizes["seqs"][1]
    return most if options.max_seqs is None else min(options.max_seqs, most)


def _check_model_plan(plan: Plan) -> None:
    """Raise CorruptBundle where a plan is none of a language model, which has these sizes."""
    missing = {"tokens", "seqs", "blocks"} - plan.sizes.keys()
    if missing or not plan.states or len(plan.output_slots) != 1:
        what = f"no size {min(missing)!r}" if missing else "no KV cache, or not one result"
        raise lie(f"{what}, in the plan of a language model")


def _check_encoder_plan(plan: Plan) -> None:
    """Raise CorruptBundle where a plan is none of an encoder, which has these sizes."""
    missing = {"tokens", "seqs_plus_one"} - plan.sizes.keys()
    if missing or plan.states or len(plan.output_slots) != 1:
        what = f"no size {min(missing)!r}" if missing else "a KV cache, or not one result"
        raise lie(f"{what}, in the plan of an encoder")


def open_weights(spec: ModelSpec, plan: Plan, *, random_seed: int | None = None) -> Checkpoint:
    """Return a model directory's weights, or random ones of the plan's shapes; raises WeightsError where
    they aren't those of the plan."""
    if random_seed is None:
        return open_checkpoint(spec.source, wanted_by(plan), folders=spec.config.weight_folders)
    specs = {
        take.name: TensorMeta(take.shape, getattr(torch, wanted.dtype if wanted.dtype in may_be else min(may_be)))
        for wanted in wanted_by(plan)
        for take, may_be in stored_takes(wanted.source, castable(wanted.dtype))
    }
    return random_checkpoint(specs, seed=random_seed)
