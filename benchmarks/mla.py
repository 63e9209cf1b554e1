"""Latent attention with its steps compiled ("exposed") beside the same steps in one operator ("opaque"), and vLLM.

layers: forwards of a few layers of DeepSeek-V2-Lite's shapes, by regime; both forms take turns in one process. serving:
chats all at once through the engine, and through vLLM's. offline: the workload of `benchmarks.throughput`. In these two
every system runs in processes of its own, taking turns. Needs the machine to itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final, final

from benchmarks.cells.chats import add_load_options, load_of
from benchmarks.common.chats import ChatLoad, figures_of
from benchmarks.common.main import Benchmark, add_option, names, positive
from benchmarks.common.models import RANDOM_MODELS, TINY_LATENT, LatentShape, RandomModel
from benchmarks.common.run import Bound, Run
from benchmarks.common.vllm_peer import THROUGHPUT_SCRIPT, Vllm, add_peers_options, find_vllm
from benchmarks.throughput import (
    Offline,
    Ours,
    System,
    VllmThroughput,
    Workload,
    add_workload_options,
    take_turns,
    workload_of,
)
from piecework.models.sample_batches import Batch
from piecework.spec.config import read_config

FORMS: Final = ("exposed", "opaque")
SYSTEMS: Final = (*FORMS, "vllm")
PARTS: Final = ("layers", "serving", "offline")
DTYPES: Final = ("bfloat16", "float32")
# DeepSeek-V2-Lite's; an MLP is as wide as its two shared experts, because routed ones are the same in both forms
LITE: Final = LatentShape(hidden=2048, heads=16, intermediate=2816, vocab=1024)
LAYER_SHAPES: Final = {"v2-lite": LITE, "tiny": TINY_LATENT}
_STEPS: Final = 5
_RATES: Final = ("tok_s", "output_throughput", "output_tok_s")


def layer_batches(context: int) -> tuple[Batch, ...]:
    """Return the batches that layers are measured with: `context` tokens are in the cache before, where any are."""
    decode = tuple(Batch(decode=count, decode_context=context) for count in (1, 8, 32))
    return (
        *decode,
        Batch(prompts=4, prompt_tokens=256),
        Batch(prompts=4, prompt_tokens=128, prompt_context=context),
        Batch(decode=16, decode_context=context, prompts=1, prompt_tokens=480),
    )


@final
class Layers(System):
    """Forwards of a few layers, of all forms in turns in one process: it is small differences that are asked for.

    Every second process loads the forms the other way about. Where one form fails, none is measured.
    """

    def __init__(self, run: Run, work: Workload, args: argparse.Namespace, forms: Sequence[str]) -> None:
        self.name = " and ".join(forms)
        self._run, self._work, self._args = run, work, args
        self._batches = layer_batches(args.context)
        self._order = [Offline(run, work, backend=args.backend, form=form) for form in forms]

    def prepare(self) -> None:
        for form in self._order:
            form.prepare()

    def measure(self) -> None:
        batches = json.dumps([asdict(batch) for batch in self._batches])
        words = [str(self._work.model), *(form.bundle for form in self._order), "--batches", batches]
        words += ["--steps", str(_STEPS), "--seconds", str(self._args.seconds)]
        caches = self._run.launcher.caches("piecework", fresh=False)
        found = self._run.launcher.cell("mla_layers", *words, caches=caches).figures["bundles"]
        for form, rates in zip(self._order, found, strict=True):
            for batch, rate in zip(self._batches, rates, strict=True):
                key = {"layers": self._work.layers, "dtype": self._work.dtype, "regime": batch.regime}
                key |= {"batch": batch.num_seqs, "context": batch.context}
                note = f"forwards of {batch}; median of those of each process"
                self._run.add(rate, system=form.name, metric="tok_s", note=note, **key)
        self._order.reverse()


@final
class Serving(Ours):
    """Chats all at once, through the engine: what a serving benchmark would show, without a network."""

    def __init__(self, run: Run, work: Workload, load: ChatLoad, *, backend: str, form: str) -> None:
        super().__init__(run, work, backend=backend, form=form)
        self._load = load

    def measure(self) -> None:
        words = [str(self._work.model), "--bundle", self.bundle]
        for name, value in asdict(self._load).items():
            words += [f"--chat-{name.replace('_', '-')}", str(value)]
        figures = self._run.launcher.cell("chats", *words, caches=self._caches()).figures
        add_serving(self._run, self._work, self.name, figures, load=self._load)


@final
class VllmServing(System):
    """The same chats through vLLM's own engine."""

    name = "vllm"

    def __init__(self, run: Run, vllm: Vllm, work: Workload, *, load: ChatLoad) -> None:
        self._run, self._vllm, self._work, self._load = run, vllm, work, load
        self._chats = load.draw(vocab=read_config(work.model).vocab_size)

    def prepare(self) -> None:
        """Start once, so that what is measured finds its caches."""
        self._send(1)

    def measure(self) -> None:
        add_serving(self._run, self._work, self.name, self._send(len(self._chats)), load=self._load)

    def _send(self, count: int) -> dict[str, float]:
        chats, work = self._chats[:count], self._work
        return figures_of(self._vllm.chats(work.model, chats, dtype=work.dtype, max_length=self._load.max_length))


def add_serving(run: Run, work: Workload, system: str, figures: Mapping[str, float], *, load: ChatLoad) -> None:
    """Add what chats came to."""
    chats = load.draw(vocab=read_config(work.model).vocab_size)
    note = f"{sum(len(p) for p, _ in chats)} tokens of prompts, {sum(n for _, n in chats)} generated"
    for metric, value in figures.items():
        work.add(run, system, metric, value, batch=load.requests, note=note)


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_option(parser, "--parts", PARTS, "what to measure", type_=names(PARTS), metavar="P,…")
    add_option(parser, "--systems", SYSTEMS, "of what", type_=names(SYSTEMS), metavar="S,…")
    add_option(parser, "--end-to-end-repeats", 2, "rounds of serving and offline; --repeats are those of layers")
    layers = parser.add_argument_group("layers")
    add_option(layers, "--layers", 2, "how many")
    layers.add_argument("--layer-shape", choices=tuple(LAYER_SHAPES), default="v2-lite", help="default: %(default)s")
    layers.add_argument("--intermediate", type=positive, metavar="N", help="width of MLPs (default: the shape's)")
    add_option(layers, "--context", 512, "tokens in the cache before a forward, where any are")
    add_option(layers, "--dtypes", DTYPES, "of weights and activations", type_=names(DTYPES), metavar="D,…")
    add_option(layers, "--seconds", 1.0, "least seconds of forwards of a batch", type_=float, metavar="S")
    both = parser.add_argument_group("serving and offline")
    models = tuple(name for name in RANDOM_MODELS if name.startswith("mla"))
    both.add_argument("--random-model", choices=models, default="mla-100m", help="default: %(default)s")
    add_workload_options(both)
    add_load_options(both)
    add_peers_options(parser)


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure everything, which takes minutes."""
    forms = [name for name in FORMS if name in args.systems]
    end_to_end = {"serving", "offline"} & set(args.parts)
    asked = "vllm" in args.systems and end_to_end
    vllm = find_vllm(args, run, script=THROUGHPUT_SCRIPT if "offline" in args.parts else None) if asked else None
    shape = LAYER_SHAPES[args.layer_shape]
    shape = shape if args.intermediate is None else replace(shape, intermediate=args.intermediate)
    if "layers" in args.parts and forms:
        for dtype in args.dtypes:
            model = RandomModel(f"layers-{dtype}", args.layers, shape)
            path = model.write(run.root / model.name, dtype=dtype, weights=False)
            system = Layers(run, Workload(path, args.layers, dtype), args, forms)
            take_turns(run, [system], repeats=args.repeats, what=model.name)
    if end_to_end:
        random = RANDOM_MODELS[args.random_model]
        work = workload_of(args, random.write(run.root / random.name, dtype=args.dtype))
        if "serving" in args.parts:
            _serve(args, run, work, forms, vllm)
        if "offline" in args.parts:
            _offline(args, run, work, forms, vllm)
    check_goals(run)
    shown = ("parts", "layers", "dtypes", "seconds", "dtype", "requests", "input", "output", "runs", "backend")
    settings = {name: getattr(args, name) for name in (*shown, "end_to_end_repeats")}
    settings |= {**vars(shape), "batches": [str(batch) for batch in layer_batches(args.context)]}
    settings |= {"model": args.random_model, "chats": asdict(load_of(args)), "steps": _STEPS}
    return settings if vllm is None else {**settings, "versions": {"vllm": vllm.version}}


def _serve(args: argparse.Namespace, run: Run, work: Workload, forms: Sequence[str], vllm: Vllm | None) -> None:
    load = load_of(args)
    systems: list[System] = [Serving(run, work, load, backend=args.backend, form=form) for form in forms]
    if vllm is not None:
        systems.append(VllmServing(run, vllm, work, load=load))
    take_turns(run, systems, repeats=args.end_to_end_repeats, what="serving")


def _offline(args: argparse.Namespace, run: Run, work: Workload, forms: Sequence[str], vllm: Vllm | None) -> None:
    systems: list[System] = [Offline(run, work, backend=args.backend, form=form) for form in forms]
    if vllm is not None:
        systems.append(VllmThroughput(run, vllm, work, starts=False))
    take_turns(run, systems, repeats=args.end_to_end_repeats, what="offline")


def check_goals(run: Run) -> None:
    """Hold the exposed form's figures against the others' of the same run."""
    for key in run.find(system="exposed"):
        metric = key["metric"]
        if metric in _RATES:
            run.compare(key, 1.05 if key.get("regime") == "decode" else 1.0, Bound.AT_LEAST, system="opaque")
        if metric in ("mean_ttft_ms", "median_ttft_ms"):
            run.compare(key, 1.0, system="opaque")
        if metric in ("output_tok_s", "output_throughput"):
            run.compare(key, 1.0, Bound.AT_LEAST, aim=1.2, system="vllm")


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=3, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
