"""Requests with the lengths of recorded chats, all at once, through the engine in this process.

What a server does without its network: each request is a stream in an event loop, beside the engine's thread. Prompts
are random tokens, continuations greedy and of fixed length. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from piecework.bench.cells.forward import emit
from piecework.bench.cells.throughput import KV_CACHE_BYTES
from piecework.bench.serving.figures import Outcome, figures_of
from piecework.bench.serving.workload import DEFAULT_MEANS, Chat, Lengths, draw_chats
from piecework.engine.llm import LLM
from piecework.engine.sampling_params import SamplingParams
from piecework.spec.config import read_config

_WARM_UP_REQUESTS: Final = 8
_WARM_UP_TOKENS: Final = 8
_MEANS: Final = DEFAULT_MEANS[Lengths.SHAREGPT]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cell."""
    args = _parser().parse_args(argv)
    vocab = read_config(args.model).vocab_size
    requests = draw_chats(
        args.requests, input=args.input, output=args.output, max_length=args.max_length, vocab=vocab, seed=args.seed
    )
    # some of the same prompts, so that no operator runs for the first time later; nothing of them stays in the cache
    warm_up = [(prompt, _WARM_UP_TOKENS) for prompt, _ in requests[:_WARM_UP_REQUESTS]]
    with LLM(args.model, bundle=args.bundle, kv_cache_memory=KV_CACHE_BYTES, prefix_caching=False) as llm:
        asyncio.run(send_all(llm, warm_up))
        outcomes = asyncio.run(send_all(llm, requests))
        stats = llm.stats()
    emit({**figures_of(outcomes).to_json(), "steps": stats.steps, "preemptions": stats.preemptions})


async def send_all(llm: LLM, requests: Sequence[Chat]) -> list[Outcome]:
    """Continue all of them at once, and return when each token came, in their order."""
    begun = time.perf_counter()
    return list(await asyncio.gather(*(_send(llm, request, begun=begun) for request in requests)))


async def _send(llm: LLM, request: Chat, *, begun: float) -> Outcome:
    prompt, output = request
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    sent = time.perf_counter()
    token_s = []
    async for _ in llm.stream(prompt, params):
        token_s.append(time.perf_counter() - sent)
    assert len(token_s) == output, f"{len(token_s)} tokens instead of {output}"
    return Outcome(
        begin_s=sent - begun,
        latency_s=token_s[-1],
        token_s=tuple(token_s),
        input_tokens=len(prompt),
        output_tokens=output,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m piecework.bench.cells.mla_serving", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory with config.json and safetensors")
    parser.add_argument("--bundle", type=Path, required=True, metavar="BUNDLE", help="the model's bundle")
    for name, default, text in (
        ("--requests", 128, "how many"),
        ("--input", _MEANS[0], "mean tokens of a prompt"),
        ("--output", _MEANS[1], "mean tokens of a continuation"),
        ("--max-length", 2048, "most tokens of both"),
        ("--seed", 0, "of lengths and prompts"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    return parser


if __name__ == "__main__":
    main()
