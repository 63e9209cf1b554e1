"""Offline generation: batches of random prompts, then one request alone. Ends with a line of JSON.

The workload is that of vLLM's script beside it: random tokens from one seeded generator, new ones for every run,
greedy, of fixed length, without prefix caching, with a KV cache of 1 GiB; one run to warm up, then those that are
timed. The one request runs once unmeasured as well.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from piecework.bench.cells.forward import emit
from piecework.engine.llm import LLM
from piecework.engine.profile_options import DEFAULT_STEPS, ProfileOptions
from piecework.engine.sampling_params import SamplingParams
from piecework.spec.config import read_config

KV_CACHE_BYTES: Final = 1 << 30
LEAST_SEQS: Final = 32
_FIRST_TOKEN: Final = 300  # smaller ones may be special
_WARM_UP_TOKENS: Final = 8

Prompts = list[list[int]]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cell."""
    args = _parser().parse_args(argv)
    begun = time.perf_counter()
    notes: list[str] = []
    profile = None
    if args.profile is not None:
        profile = ProfileOptions(args.profile, steps=args.profile_steps, skip=_WARM_UP_TOKENS)
    with LLM(
        args.model,
        bundle=args.bundle,
        kv_cache_memory=KV_CACHE_BYTES,
        max_seqs=max(LEAST_SEQS, args.requests),
        prefix_caching=False,
        random_weights=args.random_weights,
        profile=profile,
        on_note=notes.append,
    ) as llm:
        init_s = time.perf_counter() - begun
        draw = PromptDraw(vocab_size=read_config(args.model).vocab_size, num_tokens=args.input)
        if profile is not None:
            figures = _profile(llm, draw, requests=args.requests, output=args.output)
        else:
            figures = measure(llm, draw, requests=args.requests, output=args.output, runs=args.runs)
    emit({"init_s": round(init_s, 2), **figures, "notes": notes})


class PromptDraw:
    """Draws prompts of random tokens, always the same ones in the same order."""

    def __init__(self, *, vocab_size: int, num_tokens: int) -> None:
        self._random = random.Random(0)
        self._tokens = range(min(_FIRST_TOKEN, vocab_size // 2), vocab_size)
        self.num_tokens = num_tokens

    def draw(self, count: int) -> Prompts:
        """Return the next prompts."""
        low, high = self._tokens.start, self._tokens.stop
        return [[self._random.randrange(low, high) for _ in range(self.num_tokens)] for _ in range(count)]


def measure(llm: LLM, draw: PromptDraw, *, requests: int, output: int, runs: int) -> dict[str, Any]:
    """Return tokens per second: of the median run, of all of them, and of one request."""
    seconds = [generate(llm, draw.draw(requests), output=output) for _ in range(runs + 1)][1:]
    alone = draw.draw(requests)[:1]
    generate(llm, alone, output=output)
    one_s = generate(llm, alone, output=output)
    return {
        "out_tok_s": round(statistics.median(requests * output / s for s in seconds), 1),
        "out_tok_s_all": [round(requests * output / s, 1) for s in seconds],
        "total_tok_s": round(requests * (draw.num_tokens + output) / statistics.median(seconds), 1),
        "one_request_tok_s": round(output / one_s, 1),
    }


def generate(llm: LLM, prompts: Prompts, *, output: int) -> float:
    """Continue the prompts by `output` tokens each, and return the seconds that it took."""
    begun = time.perf_counter()
    completions = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True))
    seconds = time.perf_counter() - begun
    lengths = {len(completion.tokens) for completion in completions}
    assert lengths == {output}, f"continuations of {lengths} tokens instead of {output}"
    return seconds


def _profile(llm: LLM, draw: PromptDraw, *, requests: int, output: int) -> dict[str, Any]:
    """Run what the profile's window leaves out, a request of as many forwards, and then the workload once."""
    generate(llm, draw.draw(1), output=_WARM_UP_TOKENS)
    return {"profiled_s": round(generate(llm, draw.draw(requests), output=output), 3)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m piecework.bench.cells.throughput", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory with config.json")
    parser.add_argument("--bundle", type=Path, required=True, metavar="BUNDLE", help="the model's bundle")
    parser.add_argument("--requests", type=int, default=32, metavar="N", help="in a batch (default: 32)")
    parser.add_argument("--input", type=int, default=128, metavar="N", help="tokens of a prompt (default: 128)")
    parser.add_argument("--output", type=int, default=64, metavar="N", help="tokens generated of each (default: 64)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="timed runs (default: 3)")
    parser.add_argument("--random-weights", type=int, metavar="SEED", help="random weights instead of safetensors")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write a trace instead of figures")
    parser.add_argument("--profile-steps", type=int, default=DEFAULT_STEPS, metavar="N", help="forwards in it")
    return parser


if __name__ == "__main__":
    main()
