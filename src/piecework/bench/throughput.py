"""`bench throughput`: generation offline, every system in a process of its own, taking turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from piecework.bench.contention import NOTEWORTHY, read_cpu_times, share_of_others
from piecework.bench.launch import CellError, Launcher
from piecework.bench.measurements import Measured, OnProgress, Sample, summarise
from piecework.bench.random_models import RandomModel
from piecework.bench.systems.throughput import PieceworkThroughput, ThroughputSystem, VllmThroughput, Workload
from piecework.bench.systems.vllm import Peers
from piecework.engine.profile_options import ProfileOptions
from piecework.spec.config import read_config

SYSTEMS: Final = ("piecework", "vllm")


@dataclass(frozen=True)
class ThroughputSettings:
    """What to measure.

    Args:
        model: a directory, or a model with random weights that is written for this run.
        dtype: of weights and activations.
        requests: in a batch.
        input, output: tokens of a prompt and of its continuation.
        runs: timed runs of a process.
        repeats: rounds, in each of which every system runs in a process of its own.
        systems: which of SYSTEMS.
        backend: of piecework's bundle, "aoti" or "eager".
        peers: the installed vLLM, or None.
        profile: a trace of piecework's forwards is written at the end; None for none. `skip` is not looked at.
    """

    model: Path | RandomModel
    dtype: str = "bfloat16"
    requests: int = 32
    input: int = 128
    output: int = 64
    runs: int = 3
    repeats: int = 3
    systems: tuple[str, ...] = SYSTEMS
    backend: str = "aoti"
    peers: Peers | None = None
    profile: ProfileOptions | None = None


def measure_throughput(settings: ThroughputSettings, *, on_progress: OnProgress) -> Measured:
    """Measure everything; takes minutes, and the machine to itself. Leaves nothing behind but a profile.

    Args:
        settings: what.
        on_progress: called with what runs, how many processes are done, and how many there are.

    Raises UnsupportedModelError for a directory that is no model.
    """
    with tempfile.TemporaryDirectory(prefix="piecework-bench-") as place:
        root = Path(place)
        on_progress("writing the model", 0, 0)
        workload = _workload(settings, root)
        launcher = Launcher(root)
        ours = PieceworkThroughput(launcher, workload, backend=settings.backend)
        made: dict[str, ThroughputSystem] = {ours.name: ours}
        if settings.peers is not None:
            made["vllm"] = VllmThroughput(launcher, settings.peers, workload)
        systems = [system for name, system in made.items() if name in settings.systems]
        result = take_turns(systems, repeats=settings.repeats, on_progress=on_progress)
        profile = settings.profile
        if profile is None or ours not in systems or ours.name in result.failed:
            return result
        on_progress("profile", 0, 0)
        try:
            note = ours.profile(profile.directory, steps=profile.steps)
        except CellError as error:
            note = f"no profile: {error.found}"
        return replace(result, notes=(*result.notes, note))


def take_turns(
    systems: Sequence[ThroughputSystem],
    *,
    repeats: int,
    on_progress: OnProgress,
    what: str = "throughput",
    first_tokens: bool = True,
) -> Measured:
    """Prepare every system, then measure one after the other, round by round. One that fails is not tried again.

    Every second round goes the other way about: a machine is slower after some systems than after others.

    Args:
        systems: in the order of their turns in the first round.
        repeats: rounds.
        on_progress: see `measure_throughput`.
        what: is measured, for progress and notes.
        first_tokens: whether each round ends with all systems' first tokens.
    """
    samples: list[Sample] = []
    notes = [note for system in systems for note in system.notes]
    failed: set[str] = set()
    total, done = len(systems) * (1 + (2 if first_tokens else 1) * repeats), 0

    def take(system: ThroughputSystem, what: str, measure: Callable[[], list[Sample]]) -> None:
        nonlocal done
        done += 1
        if system.name in failed:
            return
        text = f"{what}: {system.name}"
        on_progress(text, done - 1, total)
        before = read_cpu_times()
        try:
            samples.extend(measure())
        except CellError as error:
            failed.add(system.name)
            notes.append(f"{text} failed: {error.found}")
        others = share_of_others(before, read_cpu_times())
        if others >= NOTEWORTHY:
            notes.append(f"{text}: other processes took {others:.0%} of the machine meanwhile, so don't trust it")

    for system in systems:
        take(system, "preparing", system.prepare)
    for number in range(repeats):
        order = systems if number % 2 == 0 else systems[::-1]
        for system in order:
            take(system, what, system.throughput)
        for system in order if first_tokens else ():
            take(system, "first token", system.first_token)
    return Measured(summarise(samples), tuple(notes), frozenset(failed))


def _workload(settings: ThroughputSettings, root: Path) -> Workload:
    if isinstance(settings.model, RandomModel):
        model = settings.model.write(root / settings.model.name, dtype=settings.dtype)
        has_weights = True
    else:
        model = settings.model.absolute()
        has_weights = any(model.glob("*.safetensors"))
    return Workload(
        model,
        read_config(model).num_layers,
        settings.dtype,
        requests=settings.requests,
        input=settings.input,
        output=settings.output,
        runs=settings.runs,
        random_weights=None if has_weights else 0,
    )
