"""Linear layers in a piece on the CPU: with code of ours, with oneDNN's, and with quantized weights, all packed.

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
from piecework.bundle.quantized_layouts import Part, Sizes
from piecework.bundle.recipes import Quantized
from piecework.bundle.run.quantized import quantized_part
from piecework.ops import linear_quantized as _op  # noqa: F401  registers piecework::linear_quantized

SHAPES: Final = ((2048, 3648), (2816, 2048))
DTYPES: Final = ("bfloat16", "float32")
TOKENS: Final = (1, 8, 16, 32, 64, 256)
SYSTEMS: Final = ("own", "onednn")
QUANTIZED: Final = ("int8", "int4", "fp8")
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


class QuantizedLayers(nn.Module):
    """The same layers with quantized weights: int4 in groups of 32 columns, others by row."""

    def __init__(self, layers: Layers, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self._quantized(layer, kind) for layer in layers.layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the result of each."""
        return [torch.ops.piecework.linear_quantized(x, each.values, each.scales) for each in self.layers]

    @staticmethod
    def _quantized(layer: nn.Module, kind: str) -> nn.Module:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        rows, columns = weight.shape
        sizes = Sizes(rows, columns, 32 if kind == "int4" else columns)
        made = nn.Module()
        for part in (Part.VALUES, Part.SCALES):
            tensor = quantized_part(Quantized(kind, part, sizes, ()), [weight])
            made.register_parameter(part.value, nn.Parameter(tensor, requires_grad=False))
        return made


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_option(parser, "--dtypes", DTYPES, "of weights", type_=names(DTYPES), metavar="D,…")
    add_option(parser, "--quantized", QUANTIZED, "types of quantized weights", type_=names(QUANTIZED), metavar="T,…")
    add_option(parser, "--tokens", TOKENS, "in a call", type_=numbers, metavar="N,…")


@torch.inference_mode()
def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure all shapes."""
    for dtype in args.dtypes:
        for features, width in SHAPES:
            run.progress(f"{features} to {width}, {dtype}")
            torch.manual_seed(0)
            module = Layers(features, width, dtype=getattr(torch, dtype)).requires_grad_(requires_grad=False)
            modules: dict[str, nn.Module] = dict.fromkeys(SYSTEMS, module)
            modules |= {kind: QuantizedLayers(module, kind) for kind in args.quantized}
            example = torch.randn(8, features, dtype=getattr(torch, dtype))
            models = {
                name: _compiled(
                    which,
                    example,
                    packing=name if which is module else None,
                    out=run.root / f"{name}-{features}-{dtype}",
                )
                for name, which in modules.items()
            }
            for tokens in args.tokens:
                x = torch.randn(tokens, features, dtype=getattr(torch, dtype))
                found = time_rounds({name: partial(model, x) for name, model in models.items()}, rounds=args.repeats)
                for name, seconds in found.items():
                    times = [1e6 * each / len(module.layers) for each in seconds]
                    key = {"in": features, "out": width, "dtype": dtype, "tokens": tokens}
                    run.add(*times, system=name, metric="layer_us", **key)
    return {}


def _compiled(module: nn.Module, example: Tensor, *, packing: Any, out: Path) -> piecework.LoadedModel:
    options = piecework.CompileOptions(pack_linear=packing, passes_off=frozenset({"merge_linear"}))
    piecework.compile(module, (example,), dynamic={"tokens": piecework.Dim(1, 1024)}, out=out, options=options)
    return piecework.load(out, weights=module)


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=15, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
