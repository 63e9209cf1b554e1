"""Attention over a paged KV cache on the CPU: our kernel, plain torch, and what torch offers otherwise.

`kernel` is what bundles hold (providers/cpu_attention), `plain` the operator's definition in plain torch (ops/
attention_plain.py), `compiled` that definition under torch.compile, and `flex` FlexAttention, compiled, over keys and
values gathered from their blocks, which it can't read where they lie; the gathering counts. They take turns. Every case
cycles through several layers' caches, so that the cache is read from memory, as in a model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.common.kernels import build_kernel, num_layers
from benchmarks.common.main import Benchmark
from benchmarks.common.run import Run
from benchmarks.common.steps import time_rounds
from piecework.bundle.run.states import zeros
from piecework.ops.attention_plain import Scores, decode, prefill
from piecework.providers.cpu_attention.kernel import SOURCES, CpuAttention

BLOCK_SIZE: Final = 16


@dataclass(frozen=True)
class Case:
    """What is measured: sequences, new tokens and all tokens of each, heads, key/value heads, head dim, dtype."""

    name: str
    seqs: int
    new: int
    length: int
    heads: int
    kv_heads: int
    dim: int
    dtype: str


CASES: Final = (
    Case("decode", 1, 1, 190, 12, 12, 64, "bfloat16"),
    Case("decode", 32, 1, 160, 12, 12, 64, "bfloat16"),
    Case("decode", 32, 1, 160, 12, 12, 64, "float32"),
    Case("decode", 32, 1, 1024, 32, 8, 128, "bfloat16"),
    Case("decode", 1, 1, 4096, 32, 8, 128, "bfloat16"),
    Case("prefill", 16, 128, 128, 12, 12, 64, "bfloat16"),
    Case("prefill", 16, 128, 128, 12, 12, 64, "float32"),
    Case("prefill", 1, 2048, 2048, 32, 8, 128, "bfloat16"),
    Case("chunk", 1, 512, 4096, 32, 8, 128, "bfloat16"),
)


@dataclass(frozen=True)
class Batch:
    """A case's tensors; see ops/attention.py for their shapes."""

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    caches: tuple[Tensor, ...]
    slots: Tensor
    tables: Tensor
    lens: Tensor
    starts: Tensor

    @property
    def num_decode(self) -> int:
        """How many tokens decode."""
        return self.case.seqs if self.case.new == 1 else 0


def make_batch(case: Case) -> Batch:
    """Return random tensors; blocks lie in random order."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    width = -(-case.length // BLOCK_SIZE)
    num_blocks = case.seqs * width
    shape = (2, num_blocks, BLOCK_SIZE, case.kv_heads, case.dim)
    one = 2 * num_blocks * BLOCK_SIZE * case.kv_heads * case.dim * dtype.itemsize
    caches = tuple(zeros(shape, dtype=dtype, device="cpu").normal_() for _ in range(num_layers(one)))
    tables = torch.randperm(num_blocks).view(case.seqs, width)
    positions = torch.arange(case.length - case.new, case.length)
    slots = (tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE).flatten()
    tokens = case.seqs * case.new

    def rows(heads: int) -> Tensor:
        return torch.randn(tokens, heads, case.dim).to(dtype)

    return Batch(
        case,
        rows(case.heads),
        rows(case.kv_heads),
        rows(case.kv_heads),
        caches,
        slots,
        tables,
        torch.full((case.seqs,), case.length),
        torch.arange(case.seqs + 1) * case.new,
    )


Attend = Callable[[Batch, Tensor], Tensor]


def plain(batch: Batch, cache: Tensor) -> Tensor:
    """Attend in plain torch."""
    scores = Scores(batch.case.dim**-0.5, 0, 0.0, None)
    if batch.num_decode:
        return decode(batch.query, cache, batch.tables, batch.lens, scores)
    return prefill(batch.query, cache, batch.tables, batch.lens, batch.starts, scores)


def with_kernel(kernel: CpuAttention, batch: Batch, cache: Tensor) -> Tensor:
    """Attend with the kernel, which reads the cache where it lies."""
    rows = (batch.tables, batch.lens, batch.starts)
    return kernel.attend(batch.query, cache, *rows, batch.num_decode, batch.case.dim**-0.5)


def flex(compiled: Any, mask: Any, batch: Batch, cache: Tensor) -> Tensor:
    """Gather the blocks, then attend with FlexAttention."""
    case = batch.case
    taken = cache[:, batch.tables].flatten(2, 3)[:, :, : case.length].transpose(2, 3)
    query = batch.query.view(case.seqs, case.new, case.heads, case.dim).transpose(1, 2)
    out: Tensor = compiled(query, taken[0], taken[1], block_mask=mask, scale=case.dim**-0.5, enable_gqa=True)
    return out.transpose(1, 2).reshape(batch.query.shape)


def causal_mask(case: Case) -> Any:
    """Return FlexAttention's mask of the last `new` of `length` tokens."""
    before = case.length - case.new

    def seen(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q + before >= k

    return create_block_mask(seen, None, None, case.new, case.length, device="cpu")


@torch.inference_mode()
def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure all cases."""
    kernel = CpuAttention(build_kernel(SOURCES / "attention.cpp", run.root))
    for case in CASES:
        run.progress(str(case))
        torch.compiler.reset()
        ways: dict[str, Attend] = {
            "kernel": partial(with_kernel, kernel),
            "plain": plain,
            "compiled": torch.compile(plain),
            "flex": partial(flex, torch.compile(flex_attention), causal_mask(case)),
        }
        measure_case(run, make_batch(case), ways, rounds=args.repeats)
    return {}


def measure_case(run: Run, batch: Batch, ways: dict[str, Attend], *, rounds: int) -> None:
    """Add the time of one layer in each way. A way whose results are not the plain ones raises."""
    reference = plain(batch, batch.caches[0]).float()
    works, notes = {}, {}
    for name, way in ways.items():
        try:
            found = way(batch, batch.caches[0])
        except Exception as failure:  # what torch can't compile here is a finding, not an end
            run.notes.append(f"{name}, {batch.case}: {type(failure).__name__}: {failure}"[:200])
            continue
        notes[name] = f"largest difference from plain: {(found.float() - reference).abs().max().item():.2g}"
        works[name] = partial(_all_layers, way, batch)
    for name, seconds in time_rounds(works, rounds=rounds).items():
        times = [1e6 * each / len(batch.caches) for each in seconds]
        run.add(*times, system=name, metric="layer_us", note=notes[name], **asdict(batch.case))


def _all_layers(way: Attend, batch: Batch) -> None:
    for cache in batch.caches:
        way(batch, cache)


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=9)

if __name__ == "__main__":
    BENCHMARK.main()
