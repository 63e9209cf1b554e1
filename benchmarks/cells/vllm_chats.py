"""Chats all at once through vLLM's engine: the load of `chats.py`, run by vLLM's own Python, by this file's path.

    PYTHON vllm_chats.py REQUESTS --model MODEL --dtype DTYPE --max-length N

REQUESTS is a JSON file of [prompt tokens, number of tokens to follow] pairs. Prints a line of JSON: when each request
was sent, and when each of its events with tokens came, in seconds. Imports nothing of this package, which vLLM's Python
need not have.
"""

import argparse
import asyncio
import json
import time
from typing import Any

_WARM_UP_REQUESTS = 8
_WARM_UP_TOKENS = 8
_KV_CACHE_BYTES = 1 << 30
_MAX_TOKENS = 2048  # in one forward pass


def main() -> None:
    """Run the cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requests")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--max-length", type=int, required=True)
    args = parser.parse_args()
    with open(args.requests, encoding="utf-8") as file:
        requests = json.load(file)
    print(json.dumps({"outcomes": asyncio.run(_measure(args, requests))}), flush=True)


async def _measure(args: argparse.Namespace, requests: list[Any]) -> list[dict[str, Any]]:
    from vllm.engine.arg_utils import AsyncEngineArgs  # --help needs no vLLM
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=args.model,
            load_format="dummy",
            dtype=args.dtype,
            max_model_len=args.max_length,
            max_num_seqs=max(32, len(requests)),
            max_num_batched_tokens=_MAX_TOKENS,
            kv_cache_memory_bytes=_KV_CACHE_BYTES,
            enable_prefix_caching=False,
            seed=0,
        )
    )
    try:
        await _send_all(engine, [(prompt, _WARM_UP_TOKENS) for prompt, _ in requests[:_WARM_UP_REQUESTS]], name="warm")
        return await _send_all(engine, requests, name="chat")
    finally:
        engine.shutdown()


async def _send_all(engine: Any, requests: list[Any], *, name: str) -> list[dict[str, Any]]:
    begun = time.perf_counter()
    sent = (_send(engine, request, f"{name}-{n}", begun=begun) for n, request in enumerate(requests))
    return list(await asyncio.gather(*sent))


async def _send(engine: Any, request: Any, name: str, *, begun: float) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    prompt, output = request
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    sent = time.perf_counter()
    token_s, count = [], 0
    async for made in engine.generate({"prompt_token_ids": prompt}, params, name):
        new = len(made.outputs[0].token_ids)
        count += new
        if new:
            token_s.append(time.perf_counter() - sent)
    if count != output:
        raise SystemExit(f"{name}: {count} tokens instead of {output}")
    return {"begin_s": sent - begun, "token_s": token_s}


if __name__ == "__main__":
    main()
