"""IR ops inside an opaque op: bodies compiled with the bundle, beside eager torch and a torch.compile wrapper.

A module with an opaque op is compiled and loaded; the clock runs inside that op, while the model runs. The systems take
turns in each repeat. All is measured twice: freed memory is returned to the system first, and then it is kept. A first
run compiles, which takes a minute; the store and Inductor's cache have it then.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

import piecework
from benchmarks.common.main import Benchmark, add_option
from benchmarks.common.run import Bound, Run
from piecework.foundation.process import keep_freed_memory
from piecework.ops.activations import silu_mul
from piecework.ops.ir.declared_calls import DynamicSizes
from piecework.ops.ir.inputs import Draw
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
    op: Callable[..., Any]
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


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_option(parser, "--seconds", 0.05, "of a repeat at least", type_=float, metavar="S")


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure all cases inside the model's opaque op, twice."""
    x = torch.randn(1, 8).bfloat16()
    model = piecework.load(piecework.compile(Around(), (x,)), weights={})
    for freed in FREED:
        if freed == "kept":
            keep_freed_memory()

        def work(freed: str = freed) -> None:
            for case, counts in (*((c, TOKENS) for c in CASES), (OVERHEAD, (1,))):
                wrapped = torch.compile(case.plain, dynamic=True)
                for tokens in counts:
                    run.progress(f"{case.name}, {tokens} tokens, freed memory {freed}")
                    key: dict[str, Any] = {"op": case.name, "tokens": tokens, "width": case.width, "dtype": "bfloat16"}
                    found = call_times(case, tokens, wrapped, repeats=args.repeats, seconds=args.seconds)
                    for system, times in found.items():
                        run.add(*times, system=system, metric="call_us", **key, freed_memory=freed)

        INSIDE.work = work
        with torch.inference_mode():
            model(x)
    if model.native_fallbacks:
        raise SystemExit(f"calls without a body: {model.native_fallbacks}")
    check_goals(run)
    return {"seconds": args.seconds}


def call_times(
    case: Case, tokens: int, wrapped: Callable[..., Any], *, repeats: int, seconds: float
) -> Mapping[str, list[float]]:
    """Return microseconds per call and system, a value per repeat; runs inside the opaque op."""
    args = case.arguments(tokens)
    check(case.op(*args), case.plain(*args), case=case.name)
    functions = dict(zip(SYSTEMS, (case.op, case.plain, wrapped), strict=True))
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


def check_goals(run: Run) -> None:
    """Hold the least speed-up over eager mode, and what a call costs, against the goals."""
    for freed in FREED:
        for case in CASES:
            speedups = {}
            for key in run.find(system="piecework", op=case.name, freed_memory=freed):
                ours, eager = run.value(key), run.value({**key, "system": "eager"})
                assert ours
                assert eager
                speedups[eager / ours] = key
            worst = min(speedups)
            run.hold(speedups[worst], "times faster than eager, the least", worst, LEAST_SPEEDUP, Bound.AT_LEAST)
        (key,) = run.find(system="piecework", op=OVERHEAD.name, freed_memory=freed)
        run.hold(key, f"us of a call of {NARROW} values", run.value(key) or 0.0, MOST_OVERHEAD_US)
        run.compare(key, 1.0, system="torch.compile")


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=7, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
