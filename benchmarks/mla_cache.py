"""Decode over a cache of latents on the CPU: in the model's type, and in fp8. DeepSeek's shapes.

What is timed is `mla_write_decode` of the kernel that bundles hold (providers/cpu_mla): the new tokens' entries are
stored, and the tokens attended. Both caches take turns. A case cycles through several layers' caches, so that they are
read from memory, as in a model.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.common.kernels import build_kernel, num_layers
from benchmarks.common.main import Benchmark
from benchmarks.common.run import Run
from benchmarks.common.steps import time_rounds
from piecework.bundle.run.states import zeros
from piecework.ops.mla import cache as mla_cache
from piecework.providers.cpu_mla.kernel import SOURCES, CpuMla

BLOCK_SIZE: Final = 16
RANK, ROPE = 512, 64


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
        layers = num_layers(num_blocks * BLOCK_SIZE * self.token_bytes)
        self.caches = tuple(zeros(shape, dtype=some.dtype, device="cpu") for _ in range(layers))
        for cache in self.caches:
            cache.view(-1, 64, some.shape[1]).copy_(some)
        tables = torch.randperm(num_blocks, generator=generator).view(case.seqs, width)
        slots = tables[:, (case.length - 1) // BLOCK_SIZE] * BLOCK_SIZE + (case.length - 1) % BLOCK_SIZE
        angles = torch.randn(case.seqs, ROPE // 2, generator=generator)
        self._queries = randn(case.seqs, case.heads, RANK), randn(case.seqs, case.heads, ROPE)
        self._written: Any = randn(case.seqs, RANK + ROPE), randn(RANK), 1e-6, angles.cos(), angles.sin()
        self._rest: Any = slots, tables, torch.full((case.seqs,), case.length), (RANK + ROPE) ** -0.5

    def run(self, mla: CpuMla) -> None:
        """Store and attend, in every layer."""
        slots, *rest = self._rest
        for cache in self.caches:
            mla.write_decode(*self._queries, False, *self._written, cache, slots, *rest)


@torch.inference_mode()
def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure all cases."""
    mla = CpuMla(build_kernel(SOURCES / "mla.cpp", run.root))
    for case in CASES:
        run.progress(str(case))
        made = {kind: Decodes(case, kind) for kind in ("auto", "fp8")}
        found = time_rounds({kind: partial(decodes.run, mla) for kind, decodes in made.items()}, rounds=args.repeats)
        for kind, seconds in found.items():
            times = [1e6 * each / len(made[kind].caches) for each in seconds]
            key = {**asdict(case), "cache": kind, "bytes_per_token": made[kind].token_bytes}
            run.add(*times, system="piecework", metric="layer_us", **key)
    return {}


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=15)

if __name__ == "__main__":
    BENCHMARK.main()
