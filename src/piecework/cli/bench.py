"""`piecework bench MODEL`: how fast a model starts and generates here."""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from piecework.cli import console
from piecework.cli.child import run_command
from piecework.engine.options import engine_options
from piecework.spec.command_line import add_model, add_options, add_spec_options, spec_of

if TYPE_CHECKING:
    from piecework.engine.llm import LLM

_PROMPT: Final = "The"
_FIRST_TOKEN: Final = 300  # smaller ones may be special
_EPILOG: Final = """\
first_token_s: start of the process `piecework generate` to its first token, the bundle and the files warm
load_ms: of that, verify and open the bundle and bind the weights, without reading and packing them
output_tok_s: generated tokens per second of a batch of requests, their prompts' time included
one_request_tok_s: the same of one request alone
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure a model here: its start, and tokens per second",
        description="Continue random prompts by a fixed number of tokens, greedily and without a prefix cache: a batch "
        "of requests, then one alone. Then start the model several times, each in a new process. The bundle is "
        "compiled first where it isn't there. Needs the machine to itself.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    for name, default, text in (
        ("--requests", 32, "in a batch"),
        ("--input", 128, "tokens of a prompt"),
        ("--output", 64, "tokens generated of each"),
        ("--runs", 3, "timed runs, after one to warm up"),
    ):
        parser.add_argument(name, type=_from(1), default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--starts", type=_from(0), default=3, metavar="N", help="timed starts; 0: none (default: 3)")
    add_spec_options(parser)
    add_options(parser, engine_options("kv_cache_memory", "bundle", "trust", "random_weights", "threads"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure, and print the figures.

    Raises CompileError where a start fails, and what `piecework.LLM` raises.
    """
    notes: list[str] = []
    shown = {name: getattr(args, name) for name in ("requests", "input", "output", "runs")}
    # `piecework --help` must not pay for it
    from piecework.engine.llm import LLM  # noqa: PLC0415

    spec = spec_of(args, weights=args.random_weights is None)
    with console.progress() as progress:
        progress.update("loading the model")
        with LLM(
            spec,
            kv_cache_memory=args.kv_cache_memory,
            prefix_caching=False,
            bundle=args.bundle,
            trust=args.trust,
            random_weights=args.random_weights,
            threads=args.threads,
            on_note=notes.append,
        ) as llm:
            progress.update("generating")
            figures = measure(llm, vocab=spec.config.vocab_size, **shown)
            bundle = llm.bundle.path
    starts = _starts(args, spec.source, bundle, notes)
    found = {name: _spread(values) for name, values in (starts | figures).items()}
    made = {"model": args.model, "bundle": str(bundle), **_machine(), **shown, "figures": found, "notes": notes}
    if args.json:
        console.out_json(made)
    else:
        _show(made)
    return 0


def _starts(args: argparse.Namespace, model: Path, bundle: Path, notes: list[str]) -> dict[str, list[float]]:
    """Return the figures of each timed start from a bundle; a first one isn't counted."""
    if not args.starts:
        return {}
    if not (model / "tokenizer.json").exists():
        notes.append("no starts: piecework generate needs a tokenizer.json")
        return {}
    words = ["generate", str(model), "--bundle", str(bundle), "--prompt", _PROMPT, "--max-new-tokens", "1"]
    if args.random_weights is not None:
        words += ["--random-weights", str(args.random_weights)]
    if args.trust is not None:
        words += ["--trust", str(args.trust)]
    if args.threads is not None:
        words += ["--threads", str(args.threads)]
    found: dict[str, list[float]] = {"first_token_s": [], "load_ms": []}
    with console.progress() as progress:
        for number in range(args.starts + 1):
            progress.update("starting", done=number, total=args.starts + 1)
            figures = run_command(words, what=args.model)
            if number:
                for name, values in found.items():
                    values.append(figures[name])
    return found


def measure(llm: LLM, *, vocab: int, requests: int, input: int, output: int, runs: int) -> dict[str, list[float]]:
    """Return tokens per second of each timed run: of a batch of requests, and of one alone.

    Prompts are random tokens, other ones for each batch, always the same in each process. The one request is always the
    same.
    """
    drawn = random.Random(0)
    tokens = range(min(_FIRST_TOKEN, vocab // 2), vocab)

    def draw() -> list[list[int]]:
        return [[drawn.randrange(tokens.start, tokens.stop) for _ in range(input)] for _ in range(requests)]

    batch_s = [_generate(llm, draw(), output=output) for _ in range(runs + 1)][1:]
    alone = draw()[:1]
    alone_s = [_generate(llm, alone, output=output) for _ in range(runs + 1)][1:]
    return {
        "output_tok_s": [requests * output / seconds for seconds in batch_s],
        "total_tok_s": [requests * (input + output) / seconds for seconds in batch_s],
        "one_request_tok_s": [output / seconds for seconds in alone_s],
    }


def _generate(llm: LLM, prompts: list[list[int]], *, output: int) -> float:
    """Continue the prompts by `output` tokens each, and return the seconds that it took."""
    from piecework.engine.sampling_params import SamplingParams  # noqa: PLC0415

    begun = time.perf_counter()
    completions = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True))
    seconds = time.perf_counter() - begun
    lengths = {len(completion.tokens) for completion in completions}
    assert lengths == {output}, f"continuations of {lengths} tokens instead of {output}"
    return seconds


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, how many there are, the least and the greatest."""
    median, least, most = (round(value, 3) for value in (statistics.median(values), min(values), max(values)))
    return {"value": median, "n": len(values), "min": least, "max": most}


def _machine() -> dict[str, Any]:
    from piecework.bundle.facts import package_version  # noqa: PLC0415
    from piecework.foundation.target import read_target  # noqa: PLC0415
    from piecework.foundation.version import VERSION  # noqa: PLC0415

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"isa": read_target().isa, "cores": cores, "torch": package_version("torch"), "piecework": VERSION}


def _show(made: dict[str, Any]) -> None:
    console.out(", ".join(f"{name} {made[name]}" for name in ("isa", "cores", "torch", "piecework")))
    console.out("{requests} requests of {input} + {output} tokens".format(**made))
    parts = ("value", "n", "min", "max")
    rows = [[name, *(f"{figure[part]:g}" for part in parts)] for name, figure in made["figures"].items()]
    console.out(console.format_table(rows, header=["figure", "median", "n", "least", "most"]))
    for note in made["notes"]:
        console.status(f"note: {note}")


def _from(least: int) -> Any:
    """Return a type of option: a whole number from `least`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return parse
