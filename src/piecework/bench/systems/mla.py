"""The systems of `bench mla`: latent attention in both forms, each measured in three ways. vLLM is in throughput.py."""

from __future__ import annotations

import json
import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

from piecework.bench.cells.mla_batch import Batch
from piecework.bench.launch import Caches, Launcher
from piecework.bench.measurements import Key, Sample
from piecework.bench.systems.throughput import ThroughputSystem, Workload

SERVING_METRICS: Final = (
    "request_throughput",
    "output_throughput",
    *(f"{statistic}_{name}_ms" for name in ("ttft", "tpot", "itl") for statistic in ("mean", "median", "p99")),
)
_MAX_TOKENS: Final = 2048  # in one forward pass


@dataclass(frozen=True)
class LatentModel:
    """A model directory, its layers and dtype, the backend of its bundles, and whether it has safetensors."""

    path: Path
    layers: int
    dtype: str
    backend: str
    has_weights: bool = True


class LatentSystem(ThroughputSystem):
    """A model with latent attention in one form.

    Args:
        name: the form, "exposed" or "opaque".
        launcher: runs processes.
        model: what.
    """

    def __init__(self, name: str, launcher: Launcher, model: LatentModel) -> None:
        self.name = name
        self._launcher = launcher
        self._model = model
        self._bundle = Path()

    def prepare(self) -> list[Sample]:
        """Compile the bundle; nothing is taken of it. Both forms share a store, and what they have in common."""
        model = self._model
        words = ["-m", "piecework", "compile", str(model.path), "--dtype", model.dtype, "--mla", self.name]
        words += ["--max-tokens", str(_MAX_TOKENS), "--backend", model.backend]
        words += ["--weights", "real" if model.has_weights else "none"]
        figures = self._run([*words, "--json"])
        self._bundle = Path(figures["bundle"])
        return []

    @abstractmethod
    def throughput(self) -> list[Sample]:
        """Measure in a process of its own."""

    def _cell(self, name: str, words: Sequence[str]) -> Any:
        place = [str(self._model.path), "--bundle", str(self._bundle)]
        return self._run(["-m", f"piecework.bench.cells.{name}", *place, *words])

    def _run(self, words: Sequence[str]) -> Any:
        caches: Caches = self._launcher.caches("mla", fresh=False)
        return self._launcher.run([sys.executable, *words], variables=caches.variables()).figures


@final
class LatentLayers(LatentSystem):
    """Forwards of a few layers.

    Args:
        name, launcher, model: see `LatentSystem`.
        batches: what forwards are about.
        steps, seconds: at least so many of each, for so long.
    """

    def __init__(
        self,
        name: str,
        launcher: Launcher,
        model: LatentModel,
        *,
        batches: Sequence[Batch],
        steps: int,
        seconds: float,
    ) -> None:
        super().__init__(name, launcher, model)
        self._batches = batches
        self._options = ["--steps", str(steps), "--seconds", str(seconds)]

    def throughput(self) -> list[Sample]:
        """Time forwards of every batch."""
        batches = json.dumps([asdict(batch) for batch in self._batches])
        figures = self._cell("mla_layers", ["--batches", batches, *self._options])["batches"]
        return [self._sample(batch, found) for batch, found in zip(self._batches, figures, strict=True)]

    def _sample(self, batch: Batch, figures: Any) -> Sample:
        key = Key(
            self.name,
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
        note = f"{figures['total_input_tokens']} tokens of prompts, {figures['total_output_tokens']} generated"
        return [
            Sample(Key(self.name, model.layers, metric, model.dtype, load.requests), figures[metric], note)
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
