"""Forwards of bundles whose model has latent attention, batch by batch and in turns. Ends with a line of JSON.

Batches are of three kinds: sequences that decode, prompts, and both. Caches hold random values, in blocks that lie
anywhere. Weights are random, from a seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from piecework.bench.cells.forward import emit, time_in_turns
from piecework.bench.cells.mla_batch import Batch
from piecework.bundle.bundle import open_bundle
from piecework.bundle.plan import Plan
from piecework.bundle.run import LoadedModel, load
from piecework.engine.block_pool import DEFAULT_BLOCK_SIZE as BLOCK_SIZE
from piecework.engine.loading import open_weights

_SEED: Final = 0
_WARM_UP: Final = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cell."""
    args = _parser().parse_args(argv)
    batches = [Batch(**fields) for fields in json.loads(args.batches)]
    models = [_open(args.model, bundle) for bundle in args.bundles]
    emit({"bundles": measure(models, batches, steps=args.steps, seconds=args.seconds)})


def measure(
    models: Sequence[LoadedModel], batches: Sequence[Batch], *, steps: int, seconds: float
) -> list[list[dict[str, Any]]]:
    """Return, for each model, new tokens per second of each batch: of the median forward.

    There are at least so many forwards of each, in so many seconds; models take turns.
    """
    made: list[list[dict[str, Any]]] = [[] for _ in models]
    with torch.inference_mode():
        for batch in batches:
            for model in models:
                model.make_states({"blocks": batch.num_blocks(BLOCK_SIZE)})
                generator = torch.Generator().manual_seed(_SEED)
                for state in model.states.values():
                    state.copy_(torch.empty(state.shape).normal_(generator=generator))
            inputs = batch_inputs(batch)
            forwards = [partial(model.run, inputs) for model in models]
            found = time_in_turns(forwards, least_steps=steps, least_seconds=seconds, warm_up=_WARM_UP)
            for figures, times in zip(made, found, strict=True):
                tok_s = round(batch.num_tokens / times.median, 3)
                figures.append({**asdict(batch), "tok_s": tok_s, **times.to_json()})
    return made


def _open(model: Path, bundle: Path) -> LoadedModel:
    opened = open_bundle(bundle)
    plan = Plan.from_json(opened.plan())
    return load(opened, weights=open_weights(model, plan, random_seed=_SEED))


def batch_inputs(batch: Batch) -> dict[str, Tensor | int]:
    """Return a forward's inputs as the engine makes them, all int64; logits are those of each sequence's last token."""
    sequences = batch.sequences()
    starts = torch.tensor([start for start, _ in sequences])
    counts = torch.tensor([count for _, count in sequences])
    seq_lens = starts + counts
    query_start = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    widths = -(-seq_lens // BLOCK_SIZE)
    blocks = torch.randperm(batch.num_blocks(BLOCK_SIZE), generator=torch.Generator().manual_seed(_SEED)).split(
        widths.tolist()
    )
    tables = torch.zeros(len(sequences), int(widths.max()), dtype=torch.int64)
    for row, own in zip(tables, blocks, strict=True):
        row[: len(own)] = own
    rows = torch.arange(len(sequences)).repeat_interleave(counts)
    positions = torch.arange(batch.num_tokens) + (starts - query_start[:-1]).repeat_interleave(counts)
    return {
        "input_ids": torch.arange(batch.num_tokens) % 256,
        "positions": positions,
        "slot_mapping": tables[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
        "block_tables": tables,
        "seq_lens": seq_lens,
        "query_start": query_start,
        "logits_indices": query_start[1:] - 1,
        "num_decode_tokens": batch.decode,
        "num_prefill_tokens": batch.num_tokens - batch.decode,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m piecework.bench.cells.mla_layers", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory with config.json")
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="bundles of the model")
    parser.add_argument("--batches", required=True, metavar="JSON", help="a list of objects, see `Batch`")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="least forwards of each (default: 10)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="least seconds of them (default: 1)")
    return parser


if __name__ == "__main__":
    main()
