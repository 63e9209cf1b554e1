"""From a bundle to an engine: how large its KV cache is, its weights, and the seconds that each phase took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from piecework.bundle.bundle import Bundle
from piecework.bundle.plan import Plan
from piecework.bundle.run import LoadedModel, load
from piecework.engine.engine import Engine, EngineConfig, Runner, engine_for
from piecework.engine.kv_memory import read_memory
from piecework.engine.loading import CacheSize, num_blocks_for_cache, open_weights
from piecework.engine.text.tokenizer import Tokenizer
from piecework.server.options import ModelOptions
from piecework.server.status import Phase, ServerStatus


@dataclass(frozen=True)
class Loaded:
    """A model with its weights, and how many blocks its KV cache shall have."""

    model: LoadedModel
    num_blocks: int


def load_model(bundle: Bundle, options: ModelOptions, *, status: ServerStatus) -> Loaded:
    """Load a bundle whose facts were checked. `status` is told the phases.

    Free memory is read before anything is loaded, so that the KV cache is the same however the bundle came to be.

    Raises CorruptBundle, WeightsError, CapacityError.
    """
    plan = Plan.from_json(bundle.plan())
    spec, device = options.spec, options.spec.options.device
    size = CacheSize(num_bytes=options.kv_memory, fraction=options.memory_fraction)
    num_blocks = num_blocks_for_cache(plan, spec.config, size, device=device, memory=read_memory(device))
    at = status.uptime_s
    weights = open_weights(spec.source, plan, random_seed=options.random_weights)
    model = load(bundle, weights=weights, check_facts=False)
    for name, seconds in model.record.phases.items():  # they came one after the other
        if name != "verify":
            status.note_phase(Phase(name, at, at + seconds))
            at += seconds
    return Loaded(model, num_blocks)


def make_engine(
    loaded: Loaded,
    options: ModelOptions,
    *,
    tokenizer: Tokenizer,
    status: ServerStatus,
    on_note: Callable[[str], None] = lambda _: None,
) -> Engine:
    """Return an engine for a loaded model; its KV cache is allocated here. Raises CapacityError.

    `on_note` is told where a profile was written.
    """
    sizes = loaded.model.plan.sizes
    most_seqs = sizes["seqs"][1]
    engine_config = EngineConfig(
        num_blocks=loaded.num_blocks,
        max_tokens=sizes["tokens"][1],
        max_seqs=most_seqs if options.max_seqs is None else min(options.max_seqs, most_seqs),
        prefix_caching=options.prefix_caching,
    )
    runner: Runner = loaded.model
    if options.profile is not None:
        from piecework.engine.profiling import profiled  # noqa: PLC0415  only who profiles pays for it

        runner = profiled(loaded.model, options.profile, on_note=on_note)
    with status.phase("KV cache"):
        return engine_for(runner, engine_config, model_config=options.spec.config, tokenizer=tokenizer)
