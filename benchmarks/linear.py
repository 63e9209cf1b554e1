"""Linear layers in a piece on the CPU: with code of ours, and with oneDNN's, both on packed weights.

  python benchmarks/linear.py --out benchmarks/linear.json

A piece has several layers that read the same input; together their weights are larger than the CPU's caches, so that
they are read from memory, as in a model. Both pieces take turns. Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import piecework
from piecework.bench.machine import commit, machine, versions

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


def measure(features: int, width: int, dtype: str, *, rounds: int, root: Path) -> list[dict[str, Any]]:
    """Return a row for each number of tokens and each system: the median over rounds of the time of one layer."""
    torch.manual_seed(0)
    module = Layers(features, width, dtype=getattr(torch, dtype)).requires_grad_(requires_grad=False)
    dynamic = {"tokens": piecework.Dim(1, 1024)}
    models = {}
    for name in SYSTEMS:
        options = piecework.CompileOptions(pack_linear=name, passes_off=frozenset({"merge_linear"}))
        out = root / f"{name}-{features}-{width}-{dtype}"
        example = torch.randn(8, features, dtype=getattr(torch, dtype))
        piecework.compile(module, (example,), dynamic=dynamic, out=out, options=options)
        models[name] = piecework.load(out, weights=module)
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, features, dtype=getattr(torch, dtype))
        times: dict[str, list[float]] = {name: [] for name in SYSTEMS}
        for _ in range(rounds + 1):
            for name, model in models.items():
                begun = time.perf_counter()
                model(x)
                times[name].append(1e6 * (time.perf_counter() - begun) / len(module.layers))
        case = {"in": features, "out": width, "dtype": dtype, "tokens": tokens}
        measured = {"metric": "layer_us", "unit": "us"}
        rows += [{"system": name, **case, **measured, **_spread(found[1:])} for name, found in times.items()]
        print(case, {row["system"]: row["value"] for row in rows[-2:]}, flush=True)
    return rows


def _spread(found: Sequence[float]) -> dict[str, float]:
    middle, least, most = (round(f(found), 1) for f in (statistics.median, min, max))
    return {"value": middle, "min": least, "max": most, "n": len(found)}


def main() -> None:
    """Measure, print, and write the figures where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="default: 15")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root, torch.inference_mode():
        for dtype in DTYPES:
            for features, width in SHAPES:
                rows += measure(features, width, dtype, rounds=args.rounds, root=Path(root))
    report = {"machine": machine(), "versions": versions(), "commit": commit(), "rounds": args.rounds, "rows": rows}
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
