"""Attention over a paged KV cache on the CPU: our kernel, plain torch, and what torch offers otherwise.

  python benchmarks/attention.py --out benchmarks/attention.json

`kernel` is what bundles hold (providers/cpu_attention), `plain` the operator's definition in plain torch (ops/
attention_plain.py), `compiled` that definition under torch.compile, and `flex` FlexAttention, compiled, over keys and
values gathered from their blocks, which it can't read where they lie; the gathering counts. They take turns. Every case
cycles through several layers' caches, so that the cache is read from memory, as in a model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from piecework.bench.machine import commit, machine, versions
from piecework.bundle.run.states import zeros
from piecework.compiler.backends.toolchain import find_toolchain
from piecework.ops.attention_plain import Scores, decode, prefill
from piecework.providers.cpu_attention.kernel import SOURCES, CpuAttention

BLOCK_SIZE = 16
_CACHE_BYTES = 1 << 28  # of all layers of a case together, several times what the CPU's caches hold


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


CASES = (
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
    caches = tuple(
        zeros(shape, dtype=dtype, device="cpu").normal_() for _ in range(max(2, min(16, _CACHE_BYTES // one)))
    )
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


def flex(compiled: Any, batch: Batch, mask: Any, cache: Tensor) -> Tensor:
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


def build_kernel(directory: Path) -> CpuAttention:
    """Compile the kernel as a bundle would."""
    library = directory / "kernel.so"
    macros = ("PIECEWORK_FLOAT32", "PIECEWORK_BFLOAT16")
    find_toolchain(directory, compiler=None).compile_kernel(SOURCES / "attention.cpp", macros=macros, target=library)
    return CpuAttention(library)


def measure(batch: Batch, ways: Mapping[str, Attend], *, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each way: the median over rounds of the time of one layer, and how far results are apart."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    reference = plain(batch, batch.caches[0]).float()
    rows = []
    for name, way in list(ways.items()):
        try:
            error = (way(batch, batch.caches[0]).float() - reference).abs().max().item()
        except Exception as failure:  # what torch can't compile here is a finding, not an end
            rows.append({**asdict(batch.case), "system": name, "note": f"{type(failure).__name__}: {failure}"[:200]})
            ways = {n: w for n, w in ways.items() if n != name}
            continue
        rows.append({**asdict(batch.case), "system": name, "largest_difference": error})
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            for cache in batch.caches:
                way(batch, cache)
            times[name].append(1e6 * (time.perf_counter() - begun) / len(batch.caches))
    for row in rows:
        found = times[row["system"]][1:]
        if found:
            value = {"value": statistics.median(found), "min": min(found), "max": max(found), "n": len(found)}
            row.update({"metric": "layer_us", "unit": "us", **{k: round(v, 1) for k, v in value.items()}})
    return rows


def main() -> None:
    """Measure, print, and write the figures where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default: 9")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        kernel = build_kernel(Path(directory))
        for case in CASES:
            torch.compiler.reset()
            batch = make_batch(case)
            ways: dict[str, Attend] = {
                "kernel": partial(with_kernel, kernel),
                "plain": plain,
                "compiled": torch.compile(plain),
                "flex": partial(_flex_way, torch.compile(flex_attention), causal_mask(case)),
            }
            found = measure(batch, ways, rounds=args.rounds)
            rows += found
            print(case, {row["system"]: row.get("value", row.get("note")) for row in found})
    report = {"machine": machine(), "versions": versions(), "commit": commit(), "rounds": args.rounds, "rows": rows}
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _flex_way(compiled: Any, mask: Any, batch: Batch, cache: Tensor) -> Tensor:
    return flex(compiled, batch, mask, cache)


if __name__ == "__main__":
    main()
