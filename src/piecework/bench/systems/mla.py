"""The systems of `bench mla`: latent attention in both forms, each measured in three ways, and chats through vLLM.

Its offline throughput is in throughput.py.
"""

from __future__ import annotations

import json
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

from piecework.bench.cells.mla_batch import Batch
from piecework.bench.launch import Caches, Launcher
from piecework.bench.measurements import Key, Sample
from piecework.bench.serving.figures import Outcome, figures_of
from piecework.bench.serving.workload import Chat, draw_chats
from piecework.bench.systems.throughput import ThroughputSystem, Workload
from piecework.bench.systems.vllm import NOT_PRELOADED, Peers, engine_variables, preloaded
from piecework.spec.config import read_config

SERVING_METRICS: Final = (
    "request_throughput",
    "output_throughput",
    *(f"{statistic}_{name}_ms" for name in ("ttft", "tpot", "itl") for statistic in ("mean", "median", "p99")),
)
VLLM_CELL: Final = Path(__file__).parents[1] / "cells" / "vllm_chats.py"
_MAX_TOKENS: Final = 2048  # in one forward pass


@dataclass(frozen=True)
class LatentModel:
    """A model directory, its layers and dtype, the backend of its bundles, and whether it has safetensors."""

    path: Path
    layers: int
    dtype: str
    backend: str
    has_weights: bool = True


@dataclass(frozen=True)
class _Processes:
    """Runs this package's processes for a model, all with the same caches."""

    launcher: Launcher
    model: LatentModel

    def compile(self, form: str) -> Path:
        """Return the bundle of the model in a form. All forms share a store, and what they have in common."""
        model = self.model
        words = ["-m", "piecework", "compile", str(model.path), "--dtype", model.dtype, "--mla", form]
        words += ["--max-tokens", str(_MAX_TOKENS), "--backend", model.backend]
        words += ["--weights", "real" if model.has_weights else "none"]
        return Path(self.run([*words, "--json"])["bundle"])

    def run(self, words: Sequence[str]) -> Any:
        """Return the figures of a process."""
        caches: Caches = self.launcher.caches("mla", fresh=False)
        return self.launcher.run([sys.executable, *words], variables=caches.variables()).figures


class LatentSystem(ThroughputSystem):
    """A model with latent attention in one form, in processes of its own.

    Args:
        name: the form, "exposed" or "opaque".
        launcher: runs processes.
        model: what.
    """

    def __init__(self, name: str, launcher: Launcher, model: LatentModel) -> None:
        self.name = name
        self._processes = _Processes(launcher, model)
        self._model = model
        self._bundle = Path()

    def prepare(self) -> list[Sample]:
        """Compile the bundle; nothing is taken of it."""
        self._bundle = self._processes.compile(self.name)
        return []

    @abstractmethod
    def throughput(self) -> list[Sample]:
        """Measure in a process of its own."""

    def _cell(self, name: str, words: Sequence[str]) -> Any:
        place = [str(self._model.path), "--bundle", str(self._bundle)]
        return self._processes.run(["-m", f"piecework.bench.cells.{name}", *place, *words])


@final
class LatentLayers(ThroughputSystem):
    """Forwards of a few layers, of all forms in turns in one process: it is small differences that are asked for.

    Where one form fails, none is measured.

    Args:
        forms: "exposed", "opaque", or both.
        launcher, model: see `LatentSystem`.
        batches: what forwards are about.
        steps, seconds: at least so many of each, for so long.
    """

    def __init__(
        self,
        forms: Sequence[str],
        launcher: Launcher,
        model: LatentModel,
        *,
        batches: Sequence[Batch],
        steps: int,
        seconds: float,
    ) -> None:
        self.name = " and ".join(forms)
        self._processes = _Processes(launcher, model)
        self._model = model
        self._batches = batches
        self._options = ["--steps", str(steps), "--seconds", str(seconds)]
        self._order = list(forms)
        self._bundles: dict[str, Path] = {}

    def prepare(self) -> list[Sample]:
        """Compile the bundles; nothing is taken of it."""
        self._bundles = {form: self._processes.compile(form) for form in self._order}
        return []

    def throughput(self) -> list[Sample]:
        """Time forwards of every batch. Every second process loads the forms the other way about."""
        batches = json.dumps([asdict(batch) for batch in self._batches])
        bundles = [str(self._bundles[form]) for form in self._order]
        words = [str(self._model.path), *bundles, "--batches", batches, *self._options]
        found = self._processes.run(["-m", "piecework.bench.cells.mla_layers", *words])["bundles"]
        by_form = dict(zip(self._order, found, strict=True))
        self._order.reverse()
        return [
            self._sample(form, batch, figures)
            for form in self._bundles
            for batch, figures in zip(self._batches, by_form[form], strict=True)
        ]

    def _sample(self, form: str, batch: Batch, figures: Any) -> Sample:
        key = Key(
            form,
            self._model.layers,
            "tok_s",
            self._model.dtype,
            batch.num_seqs,
            regime=batch.regime,
            context=batch.context,
        )
        return Sample(key, figures["tok_s"], f"forwards of {batch}; median of those of each process")


@dataclass(frozen=True)
class ChatLoad:
    """Requests with the lengths of recorded chats: how many, the means of their lengths, and the longest of all."""

    requests: int = 128
    input: int = 220
    output: int = 200
    max_length: int = 2048


@final
class LatentServing(LatentSystem):
    """Chats all at once, through the engine: what a serving benchmark would show, without a network."""

    def __init__(self, name: str, launcher: Launcher, model: LatentModel, *, load: ChatLoad) -> None:
        super().__init__(name, launcher, model)
        self._load = load

    def throughput(self) -> list[Sample]:
        """Run all requests once."""
        load, model = self._load, self._model
        words = ["--requests", str(load.requests), "--input", str(load.input), "--output", str(load.output)]
        figures = self._cell("mla_serving", [*words, "--max-length", str(load.max_length)])
        return _serving_samples(self.name, figures, model=model, load=load)


@final
class VllmServing(ThroughputSystem):
    """The same chats through vLLM's own engine, with random ("dummy") weights; its defaults, bound to our cores."""

    name = "vllm"

    def __init__(self, launcher: Launcher, peers: Peers, model: LatentModel, *, load: ChatLoad) -> None:
        self._launcher = launcher
        self._peers = peers
        self._model = model
        self._load = load
        self.notes = () if preloaded(peers) else (NOT_PRELOADED,)

    def prepare(self) -> list[Sample]:
        """Start once, so that what is measured finds its caches."""
        self._outcomes(self._chats()[:1])
        return []

    def throughput(self) -> list[Sample]:
        """Run all requests once."""
        outcomes = self._outcomes(self._chats())
        return _serving_samples(self.name, figures_of(outcomes).to_json(), model=self._model, load=self._load)

    def _chats(self) -> list[Chat]:
        load, vocab = self._load, read_config(self._model.path).vocab_size
        return draw_chats(
            load.requests, input=load.input, output=load.output, max_length=load.max_length, vocab=vocab, seed=0
        )

    def _outcomes(self, chats: Sequence[Chat]) -> list[Outcome]:
        caches = self._launcher.caches("vllm-serving", fresh=False)
        requests = caches.root / "requests.json"
        requests.write_text(json.dumps(chats))
        command = [str(self._peers.python), str(VLLM_CELL), str(requests), "--model", str(self._model.path)]
        command += ["--dtype", self._model.dtype, "--max-length", str(self._load.max_length)]
        figures = self._launcher.run(command, variables=engine_variables(self._peers, caches)).figures
        return [
            Outcome(
                begin_s=found["begin_s"],
                latency_s=found["token_s"][-1],
                token_s=tuple(found["token_s"]),
                input_tokens=len(prompt),
                output_tokens=output,
            )
            for found, (prompt, output) in zip(figures["outcomes"], chats, strict=True)
        ]


def _serving_samples(system: str, figures: Mapping[str, Any], *, model: LatentModel, load: ChatLoad) -> list[Sample]:
    note = f"{figures['total_input_tokens']} tokens of prompts, {figures['total_output_tokens']} generated"
    return [
        Sample(Key(system, model.layers, metric, model.dtype, load.requests), figures[metric], note)
        for metric in SERVING_METRICS
        if figures[metric] is not None
    ]


@final
class LatentOffline(LatentSystem):
    """The workload of `bench throughput`, that of vLLM's script."""

    def __init__(self, name: str, launcher: Launcher, model: LatentModel, *, workload: Workload) -> None:
        super().__init__(name, launcher, model)
        self._workload = workload

    def throughput(self) -> list[Sample]:
        """Run its cell."""
        work = self._workload
        words = ["--requests", str(work.requests), "--input", str(work.input), "--output", str(work.output)]
        return work.samples(self.name, self._cell("throughput", [*words, "--runs", str(work.runs)]))
