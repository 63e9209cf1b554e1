"""`piecework generate MODEL --prompt TEXT`: continue a prompt, from a stored bundle or after compiling one."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from piecework.cli import console
from piecework.engine.events import notes_to
from piecework.engine.options import engine_options, read_engine_options
from piecework.foundation.environment import read_environment
from piecework.foundation.process import keep_freed_memory, peak_rss_bytes, seconds_since_start
from piecework.spec.command_line import add_model, add_options, add_spec_options, spec_of

if TYPE_CHECKING:
    from piecework.engine.engine import Engine
    from piecework.engine.opening import OpenEngine
    from piecework.engine.request import GenerationRequest
    from piecework.engine.sampling_params import SamplingParams
    from piecework.engine.text.tokenizer import Tokenizer

_ENGINE_OPTIONS: Final = engine_options("bundle", "trust", "random_weights", "threads")


@dataclass(frozen=True)
class _Piece:
    """What one token adds: its id, the text that it completes, and when it came, in seconds since the process began."""

    token: int
    text: str
    seconds: float
    finish_reason: str | None


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt, from a stored bundle or after compiling one",
        description="Continue a prompt with the model of a directory in Hugging Face layout. Uses a valid bundle of "
        "the local store, else compiles one and stores it. The text streams to stdout.",
    )
    add_model(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="most tokens (default: 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default: 0)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest (default: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest of probability P (default: 1)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling (default: a fresh one)")
    parser.add_argument("--ignore-eos", action="store_true", help="generate on after the model's end token")
    add_spec_options(parser)
    add_options(parser, _ENGINE_OPTIONS)
    parser.add_argument("--json", action="store_true", help="print text, tokens and timings as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Generate and return the exit code.

    Raises UnsupportedModelError, BundleError, WeightsError, CompileError, RequestError, CapacityError.
    """
    gc.disable()  # start-up makes long-lived objects only
    keep_freed_memory()
    # `piecework --help` must not pay for these
    from piecework.engine.opening import open_engine  # noqa: PLC0415
    from piecework.engine.request import GenerationRequest  # noqa: PLC0415
    from piecework.engine.text.tokenizer import load_tokenizer  # noqa: PLC0415

    params = _sampling_params(args)
    spec = spec_of(args, weights=args.random_weights is None)
    tokenizer = load_tokenizer(spec.source)
    prompt = _prompt_tokens(args, tokenizer)
    # refuses an empty prompt before anything is compiled for it
    request = GenerationRequest("generate", tuple(prompt), params)
    opened = open_engine(
        spec,
        read_engine_options(vars(args), kv_cache_tokens=len(prompt) + params.max_tokens),
        environment=read_environment(),
        tokenizer=lambda: tokenizer,
        on_event=notes_to(console.status),
    )
    gc.freeze()
    gc.enable()
    pieces = _generate(opened.engine, tokenizer, request)
    if args.json:
        console.out_json(_figures(list(pieces), prompt=prompt, opened=opened))
    else:
        for piece in pieces:
            console.out(piece.text, end="")
        console.out()
    return 0


def _sampling_params(args: argparse.Namespace) -> SamplingParams:
    from piecework.engine.sampling_params import SamplingParams  # noqa: PLC0415

    return SamplingParams(
        max_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
    )


def _prompt_tokens(args: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    if args.chat:
        return tokenizer.encode_chat([{"role": "user", "content": args.prompt}])
    return tokenizer.encode(args.prompt)


def _generate(engine: Engine, tokenizer: Tokenizer, request: GenerationRequest) -> Iterator[_Piece]:
    from piecework.engine.text.deltas import OutputStream  # noqa: PLC0415

    engine.add(request)
    stream = OutputStream(tokenizer, request.params, request.prompt)
    while engine.has_work:
        for output in engine.step():
            delta = stream.add(output)
            reason = delta.finish_reason.value if delta.finish_reason else None
            yield _Piece(output.sampled.token, delta.text, seconds_since_start(), reason)


def _figures(pieces: list[_Piece], *, prompt: list[int], opened: OpenEngine) -> dict[str, Any]:
    """Return what `--json` prints. `load_ms` is verify + plan + open + bind, without reading and packing weights."""
    phases = {**opened.model.record.phases, "verify": opened.found.verify_s}
    load_s = sum(phases[name] for name in ("verify", "plan", "open", "bind"))
    decode_s = pieces[-1].seconds - pieces[0].seconds
    return {
        "text": "".join(piece.text for piece in pieces),
        "tokens": [piece.token for piece in pieces],
        "finish_reason": pieces[-1].finish_reason,
        "prompt_tokens": len(prompt),
        "bundle": str(opened.found.bundle.path),
        "load_ms": round(1e3 * load_s, 3),
        "weights_ms": round(1e3 * phases["weights"], 3),
        "pack_ms": round(1e3 * phases["pack"], 3),
        "load_phases_ms": {name: round(1e3 * seconds, 3) for name, seconds in phases.items()},
        "first_token_s": round(pieces[0].seconds, 3),
        "tokens_per_s": round((len(pieces) - 1) / decode_s, 1) if decode_s else 0.0,
        "peak_rss_mb": round(peak_rss_bytes() / 2**20, 1),
    }
