"""Linear layers in a piece on the CPU: code of ours and oneDNN's on packed weights, plain torch's; quantized weights.

A piece has several layers that read the same input; together their weights are larger than most CPUs' caches, so that
they are read from memory, as in a model. All take turns. 16-bit weights are held against the fastest of float32's.
As a lesser CPU would: `python -m benchmarks.common.at_level avx2 benchmarks.linear`. Needs a C++ compiler.
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
from benchmarks.common.run import Bound, Run
from benchmarks.common.steps import time_rounds
from piecework.bundle.quantized_layouts import Part, Sizes
from piecework.bundle.recipes import Quantized
from piecework.bundle.run.quantized import quantized_part
from piecework.ops import linear_quantized as _op  # noqa: F401  registers piecework::linear_quantized

SHAPES: Final = ((2048, 3648), (2816, 2048))
DTYPES: Final = ("bfloat16", "float16", "float32")
TOKENS: Final = (1, 8, 16, 32, 64, 256, 512)
SYSTEMS: Final = {"own": "own", "onednn": "onednn", "plain": False}
QUANTIZED: Final = ("int8", "int4", "fp8")
_WEIGHT_BYTES: Final = 1 << 27
_DECODE: Final = 32  # tokens, at most
_GOALS: Final = {True: 1.5, False: 0.95}  # decode or not: times float32's speed, without arithmetic of 16 bits


class Layers(nn.Module):
    """Linear layers without a bias, of one shape, on one input [T, in]."""

    def __init__(self, features: int, width: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        count = max(2, _WEIGHT_BYTES // (features * width * 2))
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
    for features, width in SHAPES:
        models: dict[tuple[str, str], piecework.LoadedModel] = {}
        for dtype in args.dtypes:
            run.progress(f"{features} to {width}, {dtype}")
            torch.manual_seed(0)
            module = Layers(features, width, dtype=getattr(torch, dtype)).requires_grad_(requires_grad=False)
            example = torch.randn(8, features).to(getattr(torch, dtype))
            modules: dict[str, tuple[nn.Module, Any]] = {name: (module, how) for name, how in SYSTEMS.items()}
            modules |= {kind: (QuantizedLayers(module, kind), None) for kind in args.quantized}
            for name, (which, packing) in modules.items():
                out = run.root / f"{name}-{features}-{dtype}"
                models[name, dtype] = _compiled(which, example, packing=packing, out=out)
        for tokens in args.tokens:
            x = torch.randn(tokens, features)
            ways = {
                f"{name} {dtype}": partial(model, x.to(getattr(torch, dtype)))
                for (name, dtype), model in models.items()
            }
            found = time_rounds(ways, rounds=args.repeats)
            for name, dtype in models:
                times = [1e6 * each / len(module.layers) for each in found[f"{name} {dtype}"]]
                key = {"in": features, "out": width, "dtype": dtype, "tokens": tokens}
                run.add(*times, system=name, metric="layer_us", **key)
            _hold(run, {"in": features, "out": width, "tokens": tokens}, args.dtypes)
    return {}


def _hold(run: Run, key: dict[str, int], dtypes: tuple[str, ...]) -> None:
    """Hold code of ours on 16-bit weights against the fastest of float32."""
    keys = run.find(metric="layer_us", dtype="float32", **key)
    fastest = min((value for one in keys if (value := run.value(one)) is not None), default=None)
    for dtype in dtypes:
        for one in run.find(system="own", metric="layer_us", dtype=dtype, **key):
            value = run.value(one)
            if fastest is not None and value is not None and dtype != "float32":
                limit = _GOALS[key["tokens"] <= _DECODE]
                run.hold(one, f"times float32, {dtype} {key}", fastest / value, limit, Bound.AT_LEAST)


def _compiled(module: nn.Module, example: Tensor, *, packing: Any, out: Path) -> piecework.LoadedModel:
    options = piecework.CompileOptions(pack_linear=packing, passes_off=frozenset({"merge_linear"}))
    piecework.compile(module, (example,), dynamic={"tokens": piecework.Dim(1, 1024)}, out=out, options=options)
    return piecework.load(out, weights=module)


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=15, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
