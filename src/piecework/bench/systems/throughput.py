"""The systems of `bench throughput`: each prepares itself once, and is then measured by a process at a time."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from piecework.bench.launch import Caches, Launcher
from piecework.bench.measurements import Key, Sample
from piecework.bench.systems.piecework import FIRST_TOKEN_NOTE, PROMPT
from piecework.bench.systems.vllm import FIRST_TOKEN_NOTE as VLLM_FIRST_TOKEN_NOTE
from piecework.bench.systems.vllm import NOT_PRELOADED, Peers, cores, preloaded, vllm_variables
from piecework.bench.systems.vllm import SCRIPT as STARTUP_SCRIPT

SCRIPT: Final = "vllm_throughput.py"
COLD_NOTE: Final = "wall time of the process `piecework compile`, its caches empty; before the first round"
_MAX_TOKENS: Final = 2048  # in one forward pass, as vLLM's script has it


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
        random_weights: a seed, where the directory has no weights.
    """

    model: Path
    layers: int
    dtype: str
    requests: int = 32
    input: int = 128
    output: int = 64
    runs: int = 3
    random_weights: int | None = None

    def sample(self, system: str, metric: str, value: float, *, batch: int | None = None, note: str = "") -> Sample:
        """Return a sample."""
        return Sample(Key(system, self.layers, metric, self.dtype, batch), value, note)

    def samples(self, system: str, figures: Any) -> list[Sample]:
        """Return the samples of a process that printed these figures."""
        note = f"median of {self.runs} runs in each of n processes"
        return [
            self.sample(system, "output_tok_s", figures["out_tok_s"], batch=self.requests, note=note),
            self.sample(system, "total_tok_s", figures["total_tok_s"], batch=self.requests, note=note),
            self.sample(system, "one_request_tok_s", figures["one_request_tok_s"], batch=1),
        ]


class ThroughputSystem(ABC):
    """A system that is measured; every method but `notes` runs processes and raises CellError."""

    name: str
    notes: tuple[str, ...] = ()

    @abstractmethod
    def prepare(self) -> list[Sample]:
        """Compile and warm up what the measured starts shall find."""

    @abstractmethod
    def throughput(self) -> list[Sample]:
        """Run the workload in one process."""

    def first_token(self) -> list[Sample]:
        """Start once more, warm, up to the first token; empty where that can't be had or isn't measured."""
        return []


@final
class PieceworkThroughput(ThroughputSystem):
    """This package as it is installed here."""

    name = "piecework"

    def __init__(self, launcher: Launcher, workload: Workload, *, backend: str = "aoti") -> None:
        self._launcher = launcher
        self._workload = workload
        self._backend = backend
        self._bundle = Path()

    def prepare(self) -> list[Sample]:
        """Compile the bundle, with empty caches."""
        words = ["-m", "piecework", "compile", str(self._workload.model), *self._options(), "--backend", self._backend]
        if self._workload.random_weights is not None:
            words += ["--weights", "none"]
        caches = self._caches(fresh=True)
        ran = self._launcher.run([sys.executable, *words, "--json"], variables=caches.variables())
        self._bundle = Path(ran.figures["bundle"])
        return [self._workload.sample(self.name, "cold_s", ran.wall_s, note=COLD_NOTE)]

    def throughput(self) -> list[Sample]:
        """Run the cell."""
        return self._workload.samples(self.name, self._cell(["--runs", str(self._workload.runs)]))

    def first_token(self) -> list[Sample]:
        """Run `piecework generate` for one token."""
        words = ["-m", "piecework", "generate", str(self._workload.model), "--prompt", PROMPT, "--max-new-tokens", "1"]
        words += [*self._options(), *self._weights(), "--json"]
        if self._backend != "aoti":  # which is all that `generate` would find in the store
            words += ["--bundle", str(self._bundle)]
        ran = self._launcher.run([sys.executable, *words], variables=self._caches(fresh=False).variables())
        return [self._workload.sample(self.name, "first_token_s", ran.first_output_s, note=FIRST_TOKEN_NOTE)]

    def profile(self, directory: Path, *, steps: int) -> str:
        """Run the workload once more, unmeasured, with a trace of it in a directory; return what became of that."""
        figures = self._cell(["--profile", str(directory.absolute()), "--profile-steps", str(steps)])
        return "; ".join(figures["notes"])

    def _cell(self, words: list[str]) -> Any:
        work = self._workload
        command = [sys.executable, "-m", "piecework.bench.cells.throughput", str(work.model)]
        command += ["--bundle", str(self._bundle), "--requests", str(work.requests), "--input", str(work.input)]
        command += ["--output", str(work.output), *self._weights(), *words]
        return self._launcher.run(command, variables=self._caches(fresh=False).variables()).figures

    def _options(self) -> list[str]:
        return ["--dtype", self._workload.dtype, "--max-tokens", str(_MAX_TOKENS)]

    def _weights(self) -> list[str]:
        seed = self._workload.random_weights
        return [] if seed is None else ["--random-weights", str(seed)]

    def _caches(self, *, fresh: bool) -> Caches:
        return self._launcher.caches("piecework", fresh=fresh)


@final
class VllmThroughput(ThroughputSystem):
    """vLLM with random ("dummy") weights, by its scripts; its own defaults, bound to the cores of this process.

    `first_tokens` says whether its start-up script is run as well, where there is one.
    """

    name = "vllm"

    def __init__(self, launcher: Launcher, peers: Peers, workload: Workload, *, first_tokens: bool = True) -> None:
        self._launcher = launcher
        self._peers = peers
        self._workload = workload
        startup_script = peers.script.with_name(STARTUP_SCRIPT)
        self._startup_script = startup_script if first_tokens and startup_script.is_file() else None
        self._preload = bool(preloaded(peers))
        self.notes = () if self._preload else (NOT_PRELOADED,)

    def prepare(self) -> list[Sample]:
        """Start cold once, so that the measured starts are warm ones."""
        caches = self._caches()
        for name in ("deb", "v"):  # where the script looks for the libraries to preload
            link = caches.root / name
            if not link.exists() and (self._peers.root / name).exists():
                link.symlink_to(self._peers.root / name)
        self._first_token()
        return []

    def throughput(self) -> list[Sample]:
        """Run its throughput script."""
        work = self._workload
        command = [str(self._peers.python), str(self._peers.script), "--model", str(work.model), "--dtype", work.dtype]
        command += ["--mode", "default", "--requests", str(work.requests), "--inp", str(work.input)]
        command += ["--out", str(work.output), "--reps", str(work.runs), "--bind", cores()]
        command += ["--preload", str(int(self._preload))]
        return work.samples(self.name, self._run(command))

    def first_token(self) -> list[Sample]:
        """Run its start-up script, where there is one."""
        figures = self._first_token()
        if figures is None:
            return []
        value = figures["marks"]["first_token"]
        return [self._workload.sample(self.name, "first_token_s", value, note=VLLM_FIRST_TOKEN_NOTE)]

    def _first_token(self) -> Any:
        """Start the fastest way that its scripts know: the engine in the process, artifacts from its cache."""
        if self._startup_script is None:
            return None
        work = self._workload
        command = [str(self._peers.python), str(self._startup_script), "--model", str(work.model)]
        command += ["--layers", str(work.layers), "--mode", "piecewise", "--aot", "1", "--dtype", work.dtype]
        return self._run(command)

    def _run(self, command: list[str]) -> Any:
        return self._launcher.run(command, variables=vllm_variables(self._caches())).figures

    def _caches(self) -> Caches:
        return self._launcher.caches("vllm", fresh=False)
