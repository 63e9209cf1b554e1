"""transformers' own module on our attention op, with real weights and KV caches, as torch alone runs it.

`torch_compile` is `torch.compile(fullgraph=True)` of the whole model, `torch_regional` `block.compile(fullgraph=True)`
of each decoder layer, `eager` neither. Seconds from the process's start: to the end of the first decode step, or in
eager mode to the first token of a prompt; then decode steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from piecework.capture.request import CaptureRequest

WAYS = ("torch_compile", "torch_regional", "eager")


def main() -> None:
    """Run the cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory with config.json and safetensors")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens in one forward pass")
    add_step_options(parser)
    args = parser.parse_args()
    from benchmarks.common.steps import emit  # `--help` needs no torch

    emit(measure(args, compiled=COMPILED[args.way]))


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of what is timed."""
    for name, default, text in (
        ("--batch", 1, "sequences in a decode step"),
        ("--context", 63, "tokens that each of those has in the cache before"),
        ("--steps", 50, "least steps to time; 0: none"),
        ("--prompt-tokens", 8, "tokens of the prompt that comes first"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="least seconds of steps (default: 1)")


def measure(args: argparse.Namespace, *, compiled: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """Build the model, let `compiled` set up its compilation, run it once, and time decode steps."""
    import torch

    from benchmarks.common.steps import time_steps
    from piecework.foundation.process import seconds_since_start
    from piecework.models.sample_batches import Batch, batch_inputs

    batch = Batch(decode=args.batch, decode_context=args.context)
    request = build_module(args.model, max_tokens=args.max_tokens, blocks=batch.num_blocks)
    module, decode = compiled(request.module), batch_inputs(batch)
    eager = args.way == "eager"
    first = batch_inputs(Batch(prompts=1, prompt_tokens=args.prompt_tokens)) if eager else decode
    with torch.inference_mode():
        request.call(module, first).argmax().item()
        figures: dict[str, Any] = {"first_s": round(seconds_since_start(), 3)}
        if args.steps:
            steps = [lambda: request.call(module, decode)]
            (times,) = time_steps(steps, least_steps=args.steps, least_seconds=args.seconds)
            figures |= times.to_json()
    return figures


def build_module(model_dir: Path, *, max_tokens: int, blocks: int) -> CaptureRequest:
    """Return the adapter's request for a model directory, its module with weights and KV caches of `blocks` blocks.

    Weights are copied out of the mapped file, whose tensors are not aligned as torch's own are.
    """
    import torch

    from piecework.models.adapter import build_causal_lm
    from piecework.models.checkpoint import open_checkpoint
    from piecework.spec.model_spec import ModelSpec

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


def _compile_whole(module: nn.Module) -> nn.Module:
    import torch

    return torch.compile(module, fullgraph=True)  # type: ignore[return-value]


def _compile_layers(module: nn.Module) -> nn.Module:
    for layer in module.get_submodule("model.layers").children():
        layer.compile(fullgraph=True)
    return module


COMPILED: dict[str, Callable[[Any], Any]] = dict(
    zip(WAYS, (_compile_whole, _compile_layers, lambda module: module), strict=True)
)


if __name__ == "__main__":
    main()
