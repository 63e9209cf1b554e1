"""Forwards of bundles whose model has latent attention, batch by batch and in turns. Ends with a line of JSON.

Batches are of three kinds: sequences that decode, prompts, and both. Caches hold random values, in blocks that lie
anywhere. Weights are random, from a seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch

from benchmarks.common.steps import emit, time_steps
from piecework.bundle.bundle import open_bundle
from piecework.bundle.plan import Plan
from piecework.bundle.run import LoadedModel, load
from piecework.engine.loading import open_weights
from piecework.models.sample_batches import Batch, batch_inputs
from piecework.spec.model_spec import ModelSpec

_SEED: Final = 0
_WARM_UP: Final = 2


def main() -> None:
    """Run the cell."""
    args = _parser().parse_args()
    batches = [Batch(**fields) for fields in json.loads(args.batches)]
    models = [open_model(args.model, bundle) for bundle in args.bundles]
    emit({"bundles": measure(models, batches, steps=args.steps, seconds=args.seconds)})


def open_model(model: Path, bundle: Path) -> LoadedModel:
    """Return a bundle with random weights."""
    opened = open_bundle(bundle)
    plan = Plan.from_json(opened.plan())
    return load(opened, weights=open_weights(ModelSpec.of(model), plan, random_seed=_SEED))


def measure(
    models: Sequence[LoadedModel], batches: Sequence[Batch], *, steps: int, seconds: float
) -> list[list[float]]:
    """Return, for each model, new tokens per second of each batch: of the median forward.

    There are at least so many forwards of each, in so many seconds; models take turns.
    """
    made: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for batch in batches:
            for model in models:
                model.make_states({"blocks": batch.num_blocks})
                generator = torch.Generator().manual_seed(_SEED)
                for state in model.states.values():
                    state.copy_(torch.empty(state.shape).normal_(generator=generator))
            inputs = batch_inputs(batch, scattered=True)
            forwards = [partial(model.run, inputs) for model in models]
            found = time_steps(forwards, least_steps=steps, least_seconds=seconds, warm_up=_WARM_UP)
            for rates, times in zip(made, found, strict=True):
                rates.append(round(batch.num_tokens / times.median, 3))
    return made


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory with config.json")
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="bundles of the model")
    parser.add_argument("--batches", required=True, metavar="JSON", help="a list of objects, see `Batch`")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="least forwards of each (default: 10)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="least seconds of them (default: 1)")
    return parser


if __name__ == "__main__":
    main()
