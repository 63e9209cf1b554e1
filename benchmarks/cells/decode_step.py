"""A language model's decode step after a prompt that is in its caches, from the process's start; then steps.

`piecework` is a bundle for the engine with its paged caches, `torch_compile` is `torch.compile(fullgraph=True)` of
transformers' own model with its static cache, `eager` that model as it is. All read the same checkpoint. Every step is
the same: `--batch` sequences with one new token each. The sum of the sizes of the first step's logits is a figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WAYS = ("piecework", "torch_compile", "eager")
SEED = 0


def main() -> None:
    """Run the cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory with a checkpoint")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="piecework's bundle")
    parser.add_argument("--batch", type=int, default=1, metavar="N")
    parser.add_argument("--context", type=int, default=128, metavar="N", help="tokens of each prompt (default: 128)")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="least steps to time (default: 0, none)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="least seconds of steps (default: 2)")
    args = parser.parse_args()
    from benchmarks.common.steps import emit  # `--help` needs no torch

    emit(measure(args))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Read the prompts, make a step, and time steps."""
    import torch

    from benchmarks.common.steps import time_steps
    from piecework.foundation.process import seconds_since_start

    prompts = torch.randint(3, 1000, (args.batch, args.context), generator=torch.Generator().manual_seed(SEED))
    with torch.inference_mode():
        step = _piecework(args, prompts) if args.way == "piecework" else _transformers(args, prompts)
        total = step().double().abs().sum().item()
        figures: dict[str, Any] = {"first_s": round(seconds_since_start(), 3), "logits": total}
        if args.steps:
            (times,) = time_steps([step], least_steps=args.steps, least_seconds=args.seconds)
            figures |= times.to_json()
    return figures


def _piecework(args: argparse.Namespace, prompts: torch.Tensor) -> Callable[[], torch.Tensor]:
    import torch

    from piecework.bundle.bundle import open_bundle
    from piecework.bundle.plan import Plan
    from piecework.bundle.run import load
    from piecework.engine.loading import open_weights
    from piecework.models.batch import BLOCK_SIZE, STATE_SLOTS
    from piecework.models.sample_batches import Batch, batch_inputs
    from piecework.spec.model_spec import ModelSpec

    bundle = open_bundle(args.bundle)
    weights = open_weights(ModelSpec.of(args.model), Plan.from_json(bundle.plan()))
    model = load(bundle, weights=weights)
    batch = Batch(decode=args.batch, decode_context=args.context)
    model.make_states({"blocks": batch.num_blocks, STATE_SLOTS: args.batch})
    inputs = {**batch_inputs(batch), "input_ids": prompts[:, 0].contiguous()}
    tables = torch.as_tensor(inputs["block_tables"])
    for row, prompt in enumerate(prompts):
        one = batch_inputs(Batch(prompts=1, prompt_tokens=args.context))
        at = torch.as_tensor(one["positions"])
        slots = tables[row, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        own = {"block_tables": tables[row : row + 1], "slot_mapping": slots, STATE_SLOTS: torch.tensor([row])}
        model.run({**one, **own, "input_ids": prompt})

    def step() -> torch.Tensor:
        (logits,) = model.run(inputs)
        return logits

    return step


def _transformers(args: argparse.Namespace, prompts: torch.Tensor) -> Callable[[], torch.Tensor]:
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    model = AutoModelForCausalLM.from_pretrained(args.model)
    cache = StaticCache(config=model.config, max_cache_len=2 * args.context)
    model(prompts, past_key_values=cache, use_cache=True)
    call = torch.compile(model.forward, fullgraph=True) if args.way == "torch_compile" else model.forward
    ids, positions = prompts[:, :1].contiguous(), torch.full((args.batch, 1), args.context)

    def step() -> torch.Tensor:
        logits: torch.Tensor = call(ids, position_ids=positions, past_key_values=cache, use_cache=True).logits
        return logits

    return step


if __name__ == "__main__":
    main()
