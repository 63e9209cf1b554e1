"""Decode over a cache of latents on the CPU: in the model's type, and in fp8. DeepSeek's shapes.

  python benchmarks/mla_cache.py --out benchmarks/mla_cache.json

What is timed is `mla_write_decode` of the kernel that bundles hold (providers/cpu_mla): the new tokens' entries are
stored, and the tokens attended. Both caches take turns. A case cycles through several layers' caches, so that they are
read from memory, as in a model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from piecework.bench.machine import commit, machine, versions
from piecework.bundle.run.states import zeros
from piecework.compiler.backends.toolchain import find_toolchain
from piecework.ops.mla import cache as mla_cache
from piecework.providers.cpu_mla.kernel import SOURCES, CpuMla

BLOCK_SIZE: Final = 16
RANK, ROPE = 512, 64
_CACHE_BYTES: Final = 1 << 28  # of all layers of a case together, several times what the CPU's caches hold


@dataclass(frozen=True)
class Case:
    """What is measured: sequences, tokens of each in the cache, the model's type, heads (V2-Lite has 16, V3 128)."""

    seqs: int
    length: int
    dtype: str
    heads: int = 16


CASES: Final = (
    Case(32, 512, "bfloat16"),
    Case(32, 4096, "bfloat16"),
    Case(1, 4096, "bfloat16"),
    Case(32, 512, "bfloat16", heads=128),
    Case(32, 512, "float32"),
    Case(32, 4096, "float32"),
)


class Decodes:
    """A case's tensors, over one kind of cache; blocks lie in random order."""

    def __init__(self, case: Case, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, case.dtype)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        width = -(-case.length // BLOCK_SIZE)
        num_blocks = case.seqs * width
        some = randn(64, RANK + ROPE)  # entries of the cache, over and over
        if kind == "fp8":
            some = mla_cache.encode(some, RANK)
        shape = (num_blocks, BLOCK_SIZE, some.shape[1])
        self.token_bytes = some.shape[1] * some.element_size()
        layers = max(2, min(16, _CACHE_BYTES // (num_blocks * BLOCK_SIZE * self.token_bytes)))
        self.caches = tuple(zeros(shape, dtype=some.dtype, device="cpu") for _ in range(layers))
        for cache in self.caches:
            cache.view(-1, 64, some.shape[1]).copy_(some)
        tables = torch.randperm(num_blocks, generator=generator).view(case.seqs, width)
        slots = tables[:, (case.length - 1) // BLOCK_SIZE] * BLOCK_SIZE + (case.length - 1) % BLOCK_SIZE
        angles = torch.randn(case.seqs, ROPE // 2, generator=generator)
        self._queries = randn(case.seqs, case.heads, RANK), randn(case.seqs, case.heads, ROPE)
        self._written = randn(case.seqs, RANK + ROPE), randn(RANK), 1e-6, angles.cos(), angles.sin()
        self._rest = slots, tables, torch.full((case.seqs,), case.length), (RANK + ROPE) ** -0.5

    def run(self, mla: CpuMla, cache: Tensor) -> Tensor:
        """Store and attend."""
        slots, *rest = self._rest
        return mla.write_decode(*self._queries, False, *self._written, cache, slots, *rest)


def build_kernel(directory: Path) -> CpuMla:
    """Compile the kernel as a bundle would."""
    library = directory / "kernel.so"
    macros = ("PIECEWORK_FLOAT32", "PIECEWORK_BFLOAT16")
    find_toolchain(directory, compiler=None).compile_kernel(SOURCES / "mla.cpp", macros=macros, target=library)
    return CpuMla(library)


def measure(mla: CpuMla, case: Case, *, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each cache: the median over rounds of the time of one layer."""
    made = {kind: Decodes(case, kind) for kind in ("auto", "fp8")}
    times: dict[str, list[float]] = {kind: [] for kind in made}
    for _ in range(rounds + 1):
        for kind, decodes in made.items():
            begun = time.perf_counter()
            for cache in decodes.caches:
                decodes.run(mla, cache)
            times[kind].append(1e6 * (time.perf_counter() - begun) / len(decodes.caches))
    return [
        {
            **asdict(case),
            "cache": kind,
            "bytes_per_token": decodes.token_bytes,
            "metric": "layer_us",
            "unit": "us",
            **_spread(times[kind][1:]),
        }
        for kind, decodes in made.items()
    ]


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
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        mla = build_kernel(Path(directory))
        for case in CASES:
            found = measure(mla, case, rounds=args.rounds)
            rows += found
            print(case, {row["cache"]: (row["value"], row["bytes_per_token"]) for row in found})
    report = {"machine": machine(), "versions": versions(), "commit": commit(), "rounds": args.rounds, "rows": rows}
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
