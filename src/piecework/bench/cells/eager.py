"""The model without compilation: process start to the first token of a prompt, then decode steps."""

from __future__ import annotations

from typing import Any

import torch

from piecework.bench.cells.forward import decode_inputs, emit, make_parser, num_blocks, prefill_inputs, time_steps
from piecework.bench.cells.module import build_module
from piecework.foundation.process import seconds_since_start


def main() -> None:
    """Run the cell."""
    parser = make_parser("piecework.bench.cells.eager", description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=8, metavar="N", help="the prompt's tokens (default: 8)")
    args = parser.parse_args()
    request = build_module(args.model, max_tokens=args.max_tokens, blocks=num_blocks(args.batch))
    prompt: dict[str, Any] = prefill_inputs(args.prompt_tokens)
    decode: dict[str, Any] = decode_inputs(args.batch)
    with torch.inference_mode():
        int(request.call(request.module, prompt).argmax())
        figures: dict[str, Any] = {"first_token_s": round(seconds_since_start(), 3)}
        if args.steps:
            times = time_steps(
                lambda: request.call(request.module, decode), least_steps=args.steps, least_seconds=args.seconds
            )
            figures |= times.to_json()
    emit(figures)


if __name__ == "__main__":
    main()
