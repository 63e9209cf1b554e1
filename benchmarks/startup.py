"""Cold starts, warm starts and decode steps of Llamas of random weights that differ in their number of layers.

Every measurement is a new process. A cold one starts with empty caches: store, Inductor's cache, and TMPDIR, where
torch keeps precompiled headers. A round is all cold starts, then all warm ones, then steps; in each, for each model,
the systems take turns, because a machine's speed drifts. Needs the machine to itself.
"""

from __future__ import annotations

import argparse
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, final

from benchmarks.common.launch import Caches, CellError, Launcher
from benchmarks.common.main import Benchmark, add_option, names, numbers
from benchmarks.common.models import LlamaShape, RandomModel
from benchmarks.common.run import Run
from benchmarks.common.vllm_peer import STARTUP_SCRIPT, Vllm, add_peers_options, find_vllm

SYSTEMS: Final = ("piecework", "torch_compile", "torch_regional", "eager", "vllm")
DTYPES: Final = ("float32", "bfloat16")
PROMPT: Final = "The for statement"
IMPORT_TORCH: Final = "import torch; print('{}', flush=True)"

COLD_NOTE: Final = "wall time of the process `piecework compile`, its caches empty"
FIRST_TOKEN_NOTE: Final = "from outside: start of `piecework generate` to its first output, which follows the token"
VLLM_FIRST_TOKEN_NOTE: Final = "process start to first token, warm, engine in the process"
_LOAD_NOTE: Final = "verify + read the plan + open + bind after `import torch`; weights taken and packed apart"
_RSS_NOTE: Final = (
    "peak resident memory of load and one prefill step, less that after `import torch`, less the resident part of the "
    "mapped checkpoint, less packed weights; KV cache of one block included"
)
_IMPORT_NOTE: Final = "process start to `import torch` done, its end not counted; run just before each warm start"
_TORCH_NOTE: Final = "process start to the end of the first decode step, batch 1, Inductor's caches "
_EAGER_NOTE: Final = "process start to the first token of a prompt of 8"
_COMPILED: Final = ("torch_compile", "torch_regional")


class Phase(Enum):
    """The parts of a round: cold starts, then warm ones, then steps, for which everything is warm."""

    COLD = "cold"
    WARM = "warm"
    STEPS = "steps"


@dataclass(frozen=True)
class Case:
    """A model: its directory, layers and dtype, and the most tokens in one of its forwards."""

    model: Path
    layers: int
    dtype: str
    max_tokens: int

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.dtype}"


class System(ABC):
    """A system that is measured: by running processes, whose figures it adds to a run.

    Args:
        name: as the rows have it.
        run: takes the figures, and launches the processes.
        rounds: in how many rounds it takes part in each phase; in none of a phase that isn't there.
    """

    def __init__(self, name: str, run: Run, rounds: Mapping[Phase, int]) -> None:
        self.name = name
        self.rounds = rounds
        self._run = run

    @property
    def _launcher(self) -> Launcher:
        return self._run.launcher

    @abstractmethod
    def warm_up(self, case: Case) -> None:
        """Bring the system's files into the page cache. Raises CellError."""

    @abstractmethod
    def measure(self, phase: Phase, case: Case, *, batch: int) -> None:
        """Measure a phase; `batch` is for steps. Raises CellError."""

    def _add(self, case: Case, metric: str, value: float, *, batch: int | None = None, note: str = "") -> None:
        key = {"layers": case.layers, "dtype": case.dtype, "batch": batch}
        self._run.add(value, system=self.name, metric=metric, note=note, **key)

    def _add_steps(self, case: Case, figures: Any, *, batch: int) -> None:
        note = f"median of {figures['steps']} steps in each of n processes"
        self._add(case, "step_ms", figures["step_ms"], batch=batch, note=note)


@final
class Piecework(System):
    """This package as it is installed here, by the commands that a user types."""

    def __init__(self, run: Run, *, repeats: int, steps: int) -> None:
        super().__init__("piecework", run, dict.fromkeys(Phase, repeats))
        self._steps = steps
        self._bundles: dict[Case, str] = {}

    def warm_up(self, case: Case) -> None:
        self._compile(case, self._launcher.caches("warm-up", fresh=True))

    def measure(self, phase: Phase, case: Case, *, batch: int) -> None:
        if phase is Phase.COLD:
            self._cold(case)
        elif phase is Phase.WARM:
            self._warm(case)
        else:
            self._add_steps(case, self._load(case, batch=batch, steps=self._steps), batch=batch)

    def _cold(self, case: Case) -> None:
        wall_s, figures = self._compile(case, self._caches(case, fresh=True))
        self._bundles[case] = figures["bundle"]
        self._add(case, "cold_s", wall_s, note=COLD_NOTE)
        for metric in ("capture_s", "compile_s", "pieces", "unique_pieces"):
            self._add(case, metric, figures[metric])
        self._add(case, "bundle_mb", figures["bundle_bytes"] / 2**20)

    def _warm(self, case: Case) -> None:
        caches = self._caches(case)
        importing = self._launcher.run([sys.executable, "-c", IMPORT_TORCH], variables=caches.variables())
        words = ["generate", str(case.model), "--prompt", PROMPT, "--max-new-tokens", "1", *_options(case)]
        generated = self._launcher.piecework(*words, caches=caches)
        loaded = self._load(case, batch=1, steps=0)
        self._add(case, "import_torch_s", importing.first_output_s, note=_IMPORT_NOTE)
        self._add(case, "first_token_s", generated.first_output_s, note=FIRST_TOKEN_NOTE)
        for metric, note in (
            ("load_ms", _LOAD_NOTE),
            ("load_pack_ms", ""),
            ("load_weights_ms", ""),
            ("rss_mb", _RSS_NOTE),
        ):
            self._add(case, metric, loaded[metric], note=note)

    def _compile(self, case: Case, caches: Caches) -> tuple[float, Any]:
        ran = self._launcher.piecework("compile", str(case.model), *_options(case), caches=caches)
        return ran.wall_s, ran.figures

    def _load(self, case: Case, *, batch: int, steps: int) -> Any:
        words = [str(case.model), "--bundle", self._bundles[case], "--batch", str(batch), "--steps", str(steps)]
        return self._launcher.cell("load", *words, caches=self._caches(case)).figures

    def _caches(self, case: Case, *, fresh: bool = False) -> Caches:
        return self._launcher.caches(f"piecework/{case.layers}-{case.dtype}", fresh=fresh)


@final
class TorchModule(System):
    """The same module in torch alone, in one of three ways; a static compile for each batch, in caches of its own."""

    def __init__(self, name: str, run: Run, rounds: Mapping[Phase, int], *, steps: int) -> None:
        super().__init__(name, run, rounds)
        self._steps = steps

    def warm_up(self, case: Case) -> None:
        """Do nothing: piecework's compile has brought torch and transformers into the page cache."""

    def measure(self, phase: Phase, case: Case, *, batch: int) -> None:
        cold = phase is Phase.COLD
        caches = self._launcher.caches(f"{self.name}/{case.layers}-{case.dtype}-{batch}", fresh=cold)
        words = [self.name, str(case.model), "--max-tokens", str(case.max_tokens), "--batch", str(batch)]
        words += ["--steps", str(self._steps if phase is Phase.STEPS else 0)]
        figures = self._launcher.cell("torch_module", *words, caches=caches).figures
        if cold:
            self._add(case, "cold_s", figures["first_s"], note=_TORCH_NOTE + "and TMPDIR empty")
        elif phase is Phase.WARM:
            self._add(case, "first_token_s", figures["first_s"], note=_EAGER_NOTE)
        else:
            self._add_steps(case, figures, batch=batch)
            if self.name in _COMPILED and caches.warm and batch == 1:
                self._add(case, "first_token_s", figures["first_s"], note=_TORCH_NOTE + "warm")


@final
class VllmStarts(System):
    """vLLM with its piecewise path forced, in one dtype."""

    def __init__(self, run: Run, vllm: Vllm, rounds: Mapping[Phase, int]) -> None:
        super().__init__("vllm", run, rounds)
        self._vllm = vllm

    def warm_up(self, case: Case) -> None:
        self._vllm.warm_up()

    def measure(self, phase: Phase, case: Case, *, batch: int) -> None:
        cold = phase is Phase.COLD
        caches = f"vllm/{case.layers}-{case.dtype}"
        figures = self._vllm.start(case.model, layers=case.layers, dtype=case.dtype, caches=caches, cold=cold)
        own_s, first_s = figures["compilation_time_s"], figures["marks"]["first_token"]
        if not cold:
            note = "vLLM's own compilation_time of a warm start (AOT artifacts loaded)"
            self._add(case, "load_ms", 1e3 * own_s, note=note)
            self._add(case, "first_token_s", first_s, note=VLLM_FIRST_TOKEN_NOTE)
            return
        counters = figures["counters"]
        self._add(case, "cold_s", own_s, note="vLLM's own compilation_time, all its caches and TMPDIR empty")
        self._add(case, "cold_first_token_s", first_s, note="process start to first token, cold")
        self._add(case, "pieces", counters.get("num_piecewise_capturable_graphs_seen", 0))
        self._add(case, "unique_pieces", counters.get("num_compiled_artifacts_saved", 0))
        self._add(case, "bundle_mb", figures["cache_mb"], note="all its caches on disk")


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_option(parser, "--layers", (4, 80), "numbers of layers", type_=numbers, metavar="N,…")
    add_option(parser, "--hidden", 256, "hidden size")
    add_option(parser, "--heads", 4, "attention heads")
    add_option(parser, "--intermediate", 512, "width of the MLP")
    add_option(parser, "--vocab", 1024, "tokens of the vocabulary")
    add_option(parser, "--max-tokens", 256, "most tokens in one forward pass")
    add_option(parser, "--dtypes", DTYPES, "of weights and activations", type_=names(DTYPES), metavar="D,…")
    add_option(parser, "--batches", (1, 32), "sequences in a decode step", type_=numbers, metavar="B,…")
    add_option(parser, "--systems", SYSTEMS, "what to measure", type_=names(SYSTEMS), metavar="S,…")
    add_option(parser, "--peer-repeats", 1, "rounds in which other systems compile cold, which takes most of the time")
    add_option(parser, "--steps", 50, "steps that a process times, at least")
    add_peers_options(parser)


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure everything, which takes minutes to hours."""
    shape = LlamaShape(args.hidden, args.heads, args.intermediate, args.vocab)
    vllm = find_vllm(args, run, script=STARTUP_SCRIPT) if "vllm" in args.systems else None
    run.progress("writing the models")
    cases = []
    for dtype in args.dtypes:
        for layers in args.layers:
            model = RandomModel(f"llama-{layers}-{dtype}", layers, shape)
            cases.append(Case(model.write(run.root / model.name, dtype=dtype), layers, dtype, args.max_tokens))
    systems = make_systems(args, run, vllm)
    for system in systems:
        run.progress(f"warming up: {system.name}")
        try:
            system.warm_up(cases[0])
        except CellError as error:
            run.notes.append(f"warming up {system.name} failed: {error.found}")
    for what, system, case, job in schedule(systems, cases, batches=args.batches, repeats=args.repeats):
        run.attempt(what, system.name, job, case=str(case))
    check_goals(run)
    versions = {"versions": {"vllm": vllm.version}} if vllm else {}
    return {
        "layers": args.layers,
        **vars(shape),
        "max_tokens": args.max_tokens,
        "peer_repeats": args.peer_repeats,
    } | versions


def make_systems(args: argparse.Namespace, run: Run, vllm: Vllm | None) -> list[System]:
    """Return the systems to measure; vLLM only where it is installed, and in bfloat16 if that is measured."""
    few, all_ = min(args.peer_repeats, args.repeats), args.repeats
    cold, steps = {Phase.COLD: few}, args.steps
    made: dict[str, Callable[[], System]] = {
        "piecework": lambda: Piecework(run, repeats=all_, steps=steps),
        "torch_compile": lambda: TorchModule("torch_compile", run, {**cold, Phase.STEPS: all_}, steps=steps),
        "torch_regional": lambda: TorchModule("torch_regional", run, {**cold, Phase.STEPS: few}, steps=steps),
        "eager": lambda: TorchModule("eager", run, {Phase.WARM: all_, Phase.STEPS: few}, steps=steps),
    }
    if vllm is not None:
        made["vllm"] = lambda: VllmStarts(run, vllm, {**cold, Phase.WARM: all_})
    return [make() for name, make in made.items() if name in args.systems]


def schedule(
    systems: list[System], cases: list[Case], *, batches: tuple[int, ...], repeats: int
) -> Iterator[tuple[str, System, Case, Callable[[], None]]]:
    """Yield what is due, in order: what it is, of which system and model, and what measures it."""
    dtypes = [case.dtype for case in cases]
    vllm_dtype = "bfloat16" if "bfloat16" in dtypes else dtypes[0]
    for number in range(repeats):
        for phase in Phase:
            for case in cases:
                for batch in batches if phase is Phase.STEPS else (1,):
                    what = f"{phase.value}, batch {batch}" if phase is Phase.STEPS else phase.value
                    for system in systems:
                        if number < system.rounds.get(phase, 0) and (system.name != "vllm" or case.dtype == vllm_dtype):
                            yield what, system, case, _job(system, phase, case, batch)


def check_goals(run: Run) -> None:
    """Hold our figures against the goals. Those about many layers are held at the most of the run."""
    ours = run.find(system="piecework")
    layers = sorted({key["layers"] for key in ours})
    for key in ours:
        if key["metric"] == "step_ms":
            run.compare(key, 1.0, system="torch_compile")
        if key["layers"] != layers[-1]:
            continue
        value = run.value(key) or 0.0
        match key["metric"]:
            case "cold_s":
                run.compare(key, 1.15, layers=layers[0])
                run.compare(key, 0.3, system="vllm")
                run.compare(key, 0.5, system="torch_compile")
            case "bundle_mb":
                run.compare(key, 1.1, layers=layers[0])
            case "unique_pieces":
                run.compare(key, 1.0, layers=layers[0])
            case "load_ms" | "rss_mb":
                run.hold(key, key["metric"], value, 60.0)
            case "first_token_s":
                run.hold(key, "first_token_s", value, 3.0)
                importing = run.value({**key, "metric": "import_torch_s"})
                if importing is not None:
                    run.hold(key, "first_token_s − import_torch_s", value - importing, 0.7)


def _job(system: System, phase: Phase, case: Case, batch: int) -> Callable[[], None]:
    return lambda: system.measure(phase, case, batch=batch)


def _options(case: Case) -> list[str]:
    return ["--dtype", case.dtype, "--max-tokens", str(case.max_tokens)]


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=3, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
