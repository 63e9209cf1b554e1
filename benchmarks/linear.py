"""Linear layers in a piece on the CPU: with code of ours, and with oneDNN's, both on packed weights.

A piece has several layers that read the same input; together their weights are larger than the CPU's caches, so that
they are read from memory, as in a model. Both pieces take turns. Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import piecework
from benchmarks.common.main import Benchmark, add_option, names, numbers
from benchmarks.common.run import Run
from benchmarks.common.steps import time_rounds

SHAPES: Final = ((2048, 3648), (2816, 2048))
DTYPES: Final = ("bfloat16", "float32")
TOKENS: Final = (1, 8, 16, 32, 64, 256)
SYSTEMS: Final = ("own", "onednn")
_WEIGHT_BYTES: Final = 1 << 27


class Layers(nn.Module):
    """Linear layers without a bias, of one shape, on one input [T, in]."""

    def __init__(self, features: int, width: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        count = max(2, _WEIGHT_BYTES // (features * width * dtype.itemsize))
        self.layers = nn.ModuleList(nn.Linear(features, width, bias=False, dtype=dtype) for _ in range(count))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the result of each."""
        return [layer(x) for layer in self.layers]


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_option(parser, "--dtypes", DTYPES, "of weights", type_=names(DTYPES), metavar="D,…")
    add_option(parser, "--tokens", TOKENS, "in a call", type_=numbers, metavar="N,…")


@torch.inference_mode()
def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure all shapes."""
    for dtype in args.dtypes:
        for features, width in SHAPES:
            run.progress(f"{features} to {width}, {dtype}")
            torch.manual_seed(0)
            module = Layers(features, width, dtype=getattr(torch, dtype)).requires_grad_(requires_grad=False)
            models = {name: _compiled(module, name, run.root / f"{name}-{features}-{dtype}") for name in SYSTEMS}
            for tokens in args.tokens:
                x = torch.randn(tokens, features, dtype=getattr(torch, dtype))
                found = time_rounds({name: partial(model, x) for name, model in models.items()}, rounds=args.repeats)
                for name, seconds in found.items():
                    times = [1e6 * each / len(module.layers) for each in seconds]
                    key = {"in": features, "out": width, "dtype": dtype, "tokens": tokens}
                    run.add(*times, system=name, metric="layer_us", **key)
    return {}


def _compiled(module: Layers, packing: Any, out: Path) -> piecework.LoadedModel:
    options = piecework.CompileOptions(pack_linear=packing, passes_off=frozenset({"merge_linear"}))
    weight = module.layers[0].weight
    assert isinstance(weight, Tensor)
    example = torch.randn(8, weight.shape[1], dtype=weight.dtype)
    piecework.compile(module, (example,), dynamic={"tokens": piecework.Dim(1, 1024)}, out=out, options=options)
    return piecework.load(out, weights=module)


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=15, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
