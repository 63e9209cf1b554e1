"""Requests with the lengths of recorded chats, all at once, through the engine in this process.

What a server does without its network: each request is a stream in an event loop, beside the engine's thread. Prompts
are random tokens, continuations greedy and of fixed length. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Final

from benchmarks.common.chats import Chat, ChatLoad, Outcome, figures_of
from benchmarks.common.steps import emit
from piecework import LLM, SamplingParams
from piecework.spec.config import read_config

_KV_CACHE_BYTES: Final = 1 << 30
_WARM_UP_REQUESTS: Final = 8
_WARM_UP_TOKENS: Final = 8


def main() -> None:
    """Run the cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory with config.json and safetensors")
    parser.add_argument("--bundle", type=Path, required=True, metavar="BUNDLE", help="the model's bundle")
    add_load_options(parser)
    args = parser.parse_args()
    requests = load_of(args).draw(vocab=read_config(args.model).vocab_size)
    # some of the same prompts, so that no operator runs for the first time later; nothing of them stays in the cache
    warm_up = [(prompt, _WARM_UP_TOKENS) for prompt, _ in requests[:_WARM_UP_REQUESTS]]
    with LLM(args.model, bundle=args.bundle, kv_cache_memory=_KV_CACHE_BYTES, prefix_caching=False) as llm:
        asyncio.run(send_all(llm, warm_up))
        emit(figures_of(asyncio.run(send_all(llm, requests))))


def add_load_options(parser: argparse._ActionsContainer) -> None:
    """Add an option `--chat-…` for each field of `ChatLoad`."""
    for each in fields(ChatLoad):
        name = f"--chat-{each.name.replace('_', '-')}"
        parser.add_argument(name, type=int, default=each.default, metavar="N", help=f"(default: {each.default})")


def load_of(args: argparse.Namespace) -> ChatLoad:
    """Return what those options say."""
    return ChatLoad(**{each.name: getattr(args, f"chat_{each.name}") for each in fields(ChatLoad)})


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
    return Outcome(sent - begun, tuple(token_s), output)


if __name__ == "__main__":
    main()
