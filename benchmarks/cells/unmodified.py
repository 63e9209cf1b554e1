"""An unmodified model of transformers with random weights, from the process's start to its first result; then steps.

`piecework` is `piecework.compile` for lengths from 1, and `piecework.load`; with `--warm` only the load of the bundle
in `--bundle`. `piecework_dynamo` is `torch.compile(backend="piecework", dynamic=True)`. `torch_compile` is
`torch.compile(dynamic=True)` of the whole model, `torch_regional` that of each of its blocks, `eager` neither. A step
is a forward of `--batch` sequences of `--length` tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

WAYS = ("piecework", "piecework_dynamo", "torch_compile", "torch_regional", "eager")
MODELS = ("gpt2", "bert", "gemma2", "mixtral")


def main() -> None:
    """Run the cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--layers", type=int, default=4, metavar="N")
    parser.add_argument("--batch", type=int, default=1, metavar="N")
    parser.add_argument("--length", type=int, default=64, metavar="N")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="where piecework's bundle is")
    parser.add_argument("--warm", action="store_true", help="the bundle is there already")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="least steps to time (default: 0, none)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="least seconds of steps (default: 1)")
    args = parser.parse_args()
    from benchmarks.common.steps import emit  # `--help` needs no torch

    emit(measure(args))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Make the model, run it once, and time steps."""
    import torch

    from benchmarks.common.steps import time_steps
    from piecework.foundation.process import seconds_since_start

    ids = torch.randint(3, 400, (args.batch, args.length))
    with torch.no_grad():
        module = make_model(args.model, args.layers)
        built_s = seconds_since_start()
        counts: dict[str, int] = {}
        call = _piecework(args, module, ids, counts) if args.way == "piecework" else _torch(args.way, module)
        call(ids)[0].sum().item()
        figures: dict[str, Any] = {"built_s": round(built_s, 3), "first_s": round(seconds_since_start(), 3), **counts}
        if args.steps:
            (times,) = time_steps([lambda: call(ids)], least_steps=args.steps, least_seconds=args.seconds)
            figures |= times.to_json()
    return figures


def make_model(name: str, layers: int) -> nn.Module:
    """Return a model with hidden size 256, in float32."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel

    common = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    like_bert = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": layers}
    like_llama = {**like_bert, "num_key_value_heads": 2, "head_dim": 64}
    fields = {
        "gpt2": {"n_embd": 256, "n_head": 4, "n_layer": layers, "n_positions": 1024},
        "bert": like_bert,
        "gemma2": like_llama,
        "mixtral": {**like_llama, "intermediate_size": 512, "num_local_experts": 4, "num_experts_per_tok": 2},
    }[name]
    torch.manual_seed(0)
    made: nn.Module = AutoModel.from_config(CONFIG_MAPPING[name](**common, **fields, use_cache=False))
    return made.eval().requires_grad_(requires_grad=False)


def _piecework(args: argparse.Namespace, module: nn.Module, ids: torch.Tensor, counts: dict[str, int]) -> Any:
    import piecework

    if not args.warm:
        sizes = {"length": piecework.Dim(1, 256, axes={"input_ids": 1})}
        made = piecework.compile(module, (ids,), dynamic=sizes, out=args.bundle)
        counts |= {name: made.record().counts[name] for name in ("pieces", "unique_pieces")}
    return piecework.load(args.bundle, weights=module)


def _torch(way: str, module: nn.Module) -> Callable[..., Any]:
    import torch

    if way == "eager":
        return module
    if way == "torch_regional":
        for block in _blocks(module):
            block.compile(dynamic=True)
        return module
    backend = "piecework" if way == "piecework_dynamo" else "inductor"
    return torch.compile(module, dynamic=True, backend=backend)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Return the model's layers: the elements of its longest list of modules."""
    from torch import nn

    stacks = [list(part) for part in module.modules() if isinstance(part, nn.ModuleList)]
    return max(stacks, key=len)


if __name__ == "__main__":
    main()
