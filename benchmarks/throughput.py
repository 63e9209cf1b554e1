"""Generation offline: a batch of random prompts continued greedily by a fixed number of tokens, then one alone.

Every system runs in a process of its own, and the systems take turns, every second round the other way about, because a
machine is slower after some systems than after others. Each round ends with all systems' warm starts. Needs the machine
to itself.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from benchmarks.common.launch import Caches
from benchmarks.common.main import Benchmark, add_option, names
from benchmarks.common.models import RANDOM_MODELS
from benchmarks.common.run import Bound, Run
from benchmarks.common.vllm_peer import STARTUP_SCRIPT, THROUGHPUT_SCRIPT, Vllm, add_peers_options, find_vllm
from benchmarks.startup import COLD_NOTE, FIRST_TOKEN_NOTE, PROMPT, VLLM_FIRST_TOKEN_NOTE
from piecework.spec.config import read_config

SYSTEMS: Final = ("piecework", "vllm")
MAX_TOKENS: Final = 2048  # in one forward pass, as vLLM's script has it


@dataclass(frozen=True)
class Workload:
    """What every system does: a model, and requests of fixed lengths.

    Args:
        model: directory in Hugging Face layout.
        layers: of the model.
        dtype: of weights and activations.
        requests: at the same time.
        input, output: tokens of a prompt and of its continuation.
        runs: timed runs of a process; its figure is their median.
    """

    model: Path
    layers: int
    dtype: str
    requests: int = 32
    input: int = 128
    output: int = 64
    runs: int = 3

    def add(
        self, run: Run, system: str, metric: str, value: float, *, batch: int | None = None, note: str = ""
    ) -> None:
        """Add a figure to a run."""
        run.add(value, system=system, metric=metric, note=note, layers=self.layers, dtype=self.dtype, batch=batch)

    def add_all(self, run: Run, system: str, figures: Any) -> None:
        """Add the figures that a process printed."""
        note = f"median of {self.runs} runs in each of n processes"
        self.add(run, system, "output_tok_s", figures["output_tok_s"], batch=self.requests, note=note)
        self.add(run, system, "total_tok_s", figures["total_tok_s"], batch=self.requests, note=note)
        self.add(run, system, "one_request_tok_s", figures["one_request_tok_s"], batch=1)


class System(ABC):
    """A system that takes turns with others; its methods run processes, and raise CellError."""

    name: str
    starts: bool = False
    """Whether warm starts are measured as well."""

    @abstractmethod
    def prepare(self) -> None:
        """Compile and warm up what is measured."""

    @abstractmethod
    def measure(self) -> None:
        """Run the workload in one process, and add its figures."""

    def start(self) -> None:
        """Start once more, warm, up to the first token, and add that; called where `starts` is true."""
        raise NotImplementedError


class Ours(System):
    """This package as it is installed here, with a bundle that is compiled before the first round.

    Args:
        run: takes the figures, and launches the processes.
        work: what it does.
        backend: of its bundle, "aoti" or "eager".
        form: of latent attention, which is then the system's name; None for other models.
    """

    def __init__(self, run: Run, work: Workload, *, backend: str, form: str | None = None) -> None:
        self.name = form or "piecework"
        self.bundle = ""
        self._run, self._work = run, work
        self._options = ["--dtype", work.dtype, "--max-tokens", str(MAX_TOKENS), "--backend", backend]
        self._options += [] if form is None else ["--mla", form]
        self._random = [] if any(work.model.glob("*.safetensors")) else ["--random-weights", "0"]

    def prepare(self) -> None:
        words = ["compile", str(self._work.model), *self._options, "--weights", "none" if self._random else "real"]
        ran = self._run.launcher.piecework(*words, caches=self._caches())
        self.bundle = ran.figures["bundle"]
        if self.starts:
            self._work.add(self._run, self.name, "cold_s", ran.wall_s, note=f"{COLD_NOTE}; before the first round")

    def _caches(self) -> Caches:
        return self._run.launcher.caches("piecework", fresh=False)


@final
class Offline(Ours):
    """Offline generation by `piecework bench`; `starts` says whether starts are measured as well."""

    def __init__(
        self, run: Run, work: Workload, *, backend: str, form: str | None = None, starts: bool = False
    ) -> None:
        super().__init__(run, work, backend=backend, form=form)
        self.starts = starts

    def measure(self) -> None:
        work = self._work
        words = ["bench", str(work.model), *self._options, "--requests", str(work.requests)]
        words += ["--input", str(work.input), "--output", str(work.output), "--runs", str(work.runs)]
        words += ["--starts", "0", "--kv-memory", "1GiB", *self._random]
        figures = self._run.launcher.piecework(*words, caches=self._caches()).figures["figures"]
        work.add_all(self._run, self.name, {name: figure["value"] for name, figure in figures.items()})

    def start(self) -> None:
        words = ["generate", str(self._work.model), "--prompt", PROMPT, "--max-new-tokens", "1"]
        ran = self._run.launcher.piecework(*words, *self._options, *self._random, caches=self._caches())
        self._work.add(self._run, self.name, "first_token_s", ran.first_output_s, note=FIRST_TOKEN_NOTE)


@final
class VllmThroughput(System):
    """vLLM by its scripts, with its own defaults; `starts` says whether its starts are measured as well."""

    name = "vllm"

    def __init__(self, run: Run, vllm: Vllm, work: Workload, *, starts: bool = True) -> None:
        self._run, self._vllm, self._work = run, vllm, work
        self.starts = starts and vllm.has(STARTUP_SCRIPT)

    def prepare(self) -> None:
        """Start cold once, so that the measured starts are warm ones."""
        if self.starts:
            self._first_token_s()

    def measure(self) -> None:
        work = self._work
        words = ["--requests", str(work.requests), "--inp", str(work.input), "--out", str(work.output)]
        figures = self._vllm.throughput(work.model, dtype=work.dtype, words=[*words, "--reps", str(work.runs)])
        work.add_all(self._run, self.name, {**figures, "output_tok_s": figures["out_tok_s"]})

    def start(self) -> None:
        note = VLLM_FIRST_TOKEN_NOTE
        self._work.add(self._run, self.name, "first_token_s", self._first_token_s(), note=note)

    def _first_token_s(self) -> float:
        work = self._work
        figures = self._vllm.start(work.model, layers=work.layers, dtype=work.dtype, caches="vllm")
        return float(figures["marks"]["first_token"])


def take_turns(run: Run, systems: Sequence[System], *, repeats: int, what: str) -> None:
    """Prepare every system, then measure one after the other, round by round. One that fails is not tried again."""
    for system in systems:
        run.attempt("preparing", system.name, system.prepare, case=what)
    for number in range(repeats):
        order = systems if number % 2 == 0 else systems[::-1]
        for system in order:
            run.attempt("measuring", system.name, system.measure, case=what)
        for system in (each for each in order if each.starts):
            run.attempt("first token", system.name, system.start, case=what)


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    llamas = [name for name in RANDOM_MODELS if name.startswith("llama")]
    parser.add_argument(
        "model", nargs="?", default="llama-100m", metavar="MODEL",
        help=f"a directory, which needs no safetensors, or one of {', '.join(llamas)} with random weights "
        "(default: %(default)s)",
    )  # fmt: skip
    add_workload_options(parser)
    add_option(parser, "--systems", SYSTEMS, "what to measure", type_=names(SYSTEMS), metavar="S,…")
    add_peers_options(parser)


def add_workload_options(parser: argparse._ActionsContainer) -> None:
    """Add the options of a `Workload`, and of the bundles that it runs."""
    add_option(parser, "--requests", Workload.requests, "in a batch")
    add_option(parser, "--input", Workload.input, "tokens of a prompt")
    add_option(parser, "--output", Workload.output, "tokens generated of each")
    add_option(parser, "--runs", Workload.runs, "timed runs of a process, after one to warm up")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--backend", choices=("aoti", "eager"), default="aoti", help="default: %(default)s")


def workload_of(args: argparse.Namespace, model: Path) -> Workload:
    """Return what those options say. Raises UnsupportedModelError for a directory that is no model."""
    layers = int(read_config(model).raw["num_hidden_layers"])
    return Workload(model, layers, args.dtype, args.requests, args.input, args.output, args.runs)


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure everything, which takes minutes."""
    vllm = find_vllm(args, run, script=THROUGHPUT_SCRIPT) if "vllm" in args.systems else None
    random = RANDOM_MODELS.get(args.model)
    model = Path(args.model).absolute() if random is None else random.write(run.root / random.name, dtype=args.dtype)
    work = workload_of(args, model)
    systems: list[System] = []
    if "piecework" in args.systems:
        systems.append(Offline(run, work, backend=args.backend, starts=True))
    if vllm is not None:
        systems.append(VllmThroughput(run, vllm, work))
    take_turns(run, systems, repeats=args.repeats, what="throughput")
    check_goals(run)
    shape = {} if random is None else vars(random.shape)
    versions = {} if vllm is None else {"versions": {"vllm": vllm.version}}
    return {**vars(work), "model": model.name, **shape, "backend": args.backend, **versions}


def check_goals(run: Run) -> None:
    """Hold our figures against vLLM's of the same run."""
    for key in run.find(system="piecework"):
        match key["metric"]:
            case "output_tok_s":
                run.compare(key, 1.0, Bound.AT_LEAST, aim=1.2, system="vllm")
            case "one_request_tok_s":
                run.compare(key, 1.2, Bound.AT_LEAST, system="vllm")
            case "first_token_s":
                run.compare(key, 0.2, system="vllm")


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=3, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
