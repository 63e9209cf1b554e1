"""IR ops inside an opaque op: bodies compiled with the bundle, beside eager torch and a torch.compile wrapper.

  python benchmarks/ir.py --out benchmarks/ir.json

A module with an opaque op is compiled and loaded; the clock runs inside that op, while the model runs. The systems take
turns in each repeat. All is measured twice: freed memory is returned to the system first, and then it is kept. A first
run compiles, which takes a minute; the store and Inductor's cache have it then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import piecework
from piecework.bench.machine import commit, machine, versions
from piecework.foundation.process import keep_freed_memory
from piecework.ops.activations import silu_mul
from piecework.ops.ir.declared_calls import DynamicSizes
from piecework.ops.ir.inputs import Draw
from piecework.ops.ir.op import IrOp
from piecework.ops.norms import rms_norm
from piecework.ops.quantize import quantize_dynamic_per_token, quantize_static_fp8

TOKENS = (1, 8, 64, 512, 4096)
HIDDEN, INNER, NARROW = 4096, 11008, 64
LEAST_SPEEDUP = 2.0
MOST_OVERHEAD_US = 30.0
FREED = ("returned", "kept")  # by malloc: what a program has as it comes, and what our servers ask for
SYSTEMS = ("piecework", "eager", "torch.compile")


def _gated(draw: Draw) -> Sequence[Any]:
    width = draw.width()
    return draw.tensor(draw.rows, width), draw.tensor(draw.rows, width)


def _gated_static(draw: Draw) -> Sequence[Any]:
    return *_gated(draw), torch.tensor([0.05])


@piecework.op("bench_ir::silu_mul_dynamic_fp8", inputs=_gated, tolerance={torch.float32: 1e-5})
def silu_mul_dynamic_fp8(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Compose two ops into one: its body is compiled as one piece, in which they are fused."""
    return quantize_dynamic_per_token(silu_mul(gate, up))


@piecework.op("bench_ir::silu_mul_static_fp8", inputs=_gated_static, tolerance={torch.float32: 1e-5})
def silu_mul_static_fp8(gate: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """Likewise, with a scale that is known before."""
    return quantize_static_fp8(silu_mul(gate, up), scale)


@dataclass
class Inside:
    """What the opaque op does while the model runs."""

    work: Callable[[], None] = field(default=lambda: None)


INSIDE = Inside()


@piecework.opaque_op("bench_ir::inside")
def inside(x: Tensor) -> Tensor:
    """Measure, and return x."""
    INSIDE.work()
    return x.clone()


@inside.fake
def _inside_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@inside.calls
def _inside_calls(sizes: DynamicSizes, x: Tensor) -> Iterator[Any]:
    rows = sizes.dynamic(TOKENS[-1])
    gate, up = x.new_empty(rows, 2 * INNER).chunk(2, dim=-1)
    yield silu_mul_dynamic_fp8, (gate, up)
    yield silu_mul_static_fp8, (gate, up, x.new_empty(1, dtype=torch.float32))
    yield rms_norm, (x.new_empty(rows, HIDDEN), x.new_empty(HIDDEN))
    yield silu_mul, x.new_empty(rows, 2 * NARROW).chunk(2, dim=-1)


class Around(nn.Module):
    """A module whose forward is the opaque op."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = inside(x + 1)
        return made + 1


@dataclass(frozen=True)
class Case:
    """What is called: the op, the same in plain torch, its width, and its arguments for some tokens."""

    name: str
    op: IrOp
    plain: Callable[..., Any]
    width: int
    arguments: Callable[[int], tuple[Tensor, ...]]


def halves(tokens: int, width: int) -> tuple[Tensor, ...]:
    return torch.randn(tokens, 2 * width).bfloat16().chunk(2, dim=-1)


CASES = (
    Case(
        "silu_mul + dynamic fp8",
        silu_mul_dynamic_fp8,
        lambda gate, up: quantize_dynamic_per_token.native(silu_mul.native(gate, up)),
        INNER,
        lambda n: halves(n, INNER),
    ),
    Case(
        "silu_mul + static fp8",
        silu_mul_static_fp8,
        lambda gate, up, scale: quantize_static_fp8.native(silu_mul.native(gate, up), scale),
        INNER,
        lambda n: (*halves(n, INNER), torch.tensor([0.05])),
    ),
    Case(
        "rms_norm",
        rms_norm,
        rms_norm.native,
        HIDDEN,
        lambda n: (torch.randn(n, HIDDEN).bfloat16(), torch.randn(HIDDEN).bfloat16()),
    ),
)
OVERHEAD = Case("silu_mul", silu_mul, silu_mul.native, NARROW, lambda n: halves(n, NARROW))


def load() -> piecework.LoadedModel:
    """Return the compiled module, from the store where it is there."""
    x = torch.randn(1, 8).bfloat16()
    return piecework.load(piecework.compile(Around(), (x,)), weights={})


def times(
    functions: dict[str, Callable[..., Any]], args: tuple[Tensor, ...], *, repeats: int, seconds: float
) -> dict[str, list[float]]:
    """Return microseconds per call, a value per repeat; the functions take turns."""
    counts = {}
    for name, function in functions.items():
        for _ in range(3):
            function(*args)
        begun = time.perf_counter()
        function(*args)
        counts[name] = max(1, min(2000, int(seconds / (time.perf_counter() - begun))))
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begun = time.perf_counter()
            for _ in range(counts[name]):
                function(*args)
            found[name].append(1e6 * (time.perf_counter() - begun) / counts[name])
    return found


def check(found: Any, expected: Any, *, case: str) -> None:
    """Raise where a body's results are not the native ones, to a step of fp8."""
    pairs = zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.float(), b.float(), atol=0.1, rtol=0.13, msg=lambda text: f"{case}: {text}")


def measure(
    case: Case, tokens: int, wrapped: Callable[..., Any], *, repeats: int, seconds: float
) -> dict[str, list[float]]:
    """Return microseconds per call and system; runs inside the opaque op."""
    args = case.arguments(tokens)
    check(case.op(*args), case.plain(*args), case=case.name)
    functions = dict(zip(SYSTEMS, (case.op, case.plain, wrapped), strict=True))
    return times(functions, args, repeats=repeats, seconds=seconds)


def rows_of(case: Case, tokens: int, found: dict[str, list[float]], *, freed: str) -> list[dict[str, Any]]:
    """Return a row per system: the median of the repeats, and their spread."""
    key = {"op": case.name, "tokens": tokens, "width": case.width, "dtype": "bfloat16", "freed_memory": freed}
    return [
        {
            "system": system,
            **key,
            "metric": "call_us",
            "value": round(statistics.median(values), 2),
            "unit": "us",
            "n": len(values),
            "min": round(min(values), 2),
            "max": round(max(values), 2),
        }
        for system, values in found.items()
    ]


def run(model: piecework.LoadedModel, *, freed: str, repeats: int, seconds: float) -> list[dict[str, Any]]:
    """Measure all cases inside the model's opaque op."""
    rows: list[dict[str, Any]] = []

    def work() -> None:
        for case, counts in (*((c, TOKENS) for c in CASES), (OVERHEAD, (1,))):
            wrapped = torch.compile(case.plain, dynamic=True)
            for tokens in counts:
                found = measure(case, tokens, wrapped, repeats=repeats, seconds=seconds)
                rows.extend(rows_of(case, tokens, found, freed=freed))
                print(case.name, tokens, {row["system"]: row["value"] for row in rows[-len(SYSTEMS) :]}, flush=True)

    INSIDE.work = work
    with torch.inference_mode():
        model(torch.randn(1, 8).bfloat16())
    return rows


def goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what is asked for, and whether it is reached."""
    return [goal for freed in FREED for goal in _goals([row for row in rows if row["freed_memory"] == freed], freed)]


def _goals(rows: Sequence[dict[str, Any]], freed: str) -> list[dict[str, Any]]:
    value = {(row["op"], row["tokens"], row["system"]): row["value"] for row in rows}
    made = []
    for case in CASES:
        speedups = {n: round(value[case.name, n, "eager"] / value[case.name, n, "piecework"], 2) for n in TOKENS}
        worst = min(speedups.values())
        made.append(
            {
                "what": f"{case.name}: times faster than eager, the least of {TOKENS[0]} to {TOKENS[-1]} tokens",
                "freed_memory": freed,
                "value": worst,
                "limit": LEAST_SPEEDUP,
                "met": worst >= LEAST_SPEEDUP,
                "by_tokens": speedups,
            }
        )
    ours, wrapper = value[OVERHEAD.name, 1, "piecework"], value[OVERHEAD.name, 1, "torch.compile"]
    what = f"microseconds of a call of one token of {NARROW} values"
    made.append(
        {"what": what, "value": ours, "freed_memory": freed, "limit": MOST_OVERHEAD_US, "met": ours <= MOST_OVERHEAD_US}
    )
    what = f"{what}, beside a torch.compile wrapper's"
    made.append({"what": what, "value": ours, "freed_memory": freed, "limit": wrapper, "met": ours <= wrapper})
    return made


def main() -> None:
    """Measure, print the figures, and write them where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="default: 7")
    parser.add_argument("--seconds", type=float, default=0.05, metavar="S", help="of a repeat at least (default: 0.05)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args()
    about = {"machine": machine(), "versions": versions(), "commit": commit()}
    model = load()
    rows = run(model, freed=FREED[0], repeats=args.repeats, seconds=args.seconds)
    keep_freed_memory()
    rows += run(model, freed=FREED[1], repeats=args.repeats, seconds=args.seconds)
    if model.native_fallbacks:
        raise SystemExit(f"calls without a body: {model.native_fallbacks}")
    reached = goals(rows)
    for goal in reached:
        print(goal)
    settings = {"repeats": args.repeats, "seconds": args.seconds}
    if args.out is not None:
        report = {**about, "settings": settings, "rows": rows, "goals": reached}
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
