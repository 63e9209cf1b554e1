"""`bench startup`: cold starts, warm starts and steps of every system, interleaved, round by round."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from piecework.bench.launch import CellError, Launcher
from piecework.bench.measurements import Measured, OnProgress, Sample, summarise
from piecework.bench.synthetic import ModelShape, write_llama
from piecework.bench.systems.base import Case, Phase, System
from piecework.bench.systems.modules import Compiled, Eager
from piecework.bench.systems.piecework import Piecework
from piecework.bench.systems.vllm import Peers, Vllm

SYSTEMS: Final = ("piecework", "torch_compile", "torch_regional", "eager", "vllm")
_VLLM_DTYPE: Final = "bfloat16"


@dataclass(frozen=True)
class StartupSettings:
    """What to measure.

    Args:
        layers: numbers of layers, smallest first.
        shape: the models' other sizes.
        max_tokens: most tokens in one forward.
        dtypes: of weights and activations.
        batches: sequences in a decode step.
        systems: which of SYSTEMS.
        repeats: rounds.
        peer_repeats: rounds in which the peers' cold starts, and all but the warm starts of `torch_regional` and
            `eager`, are measured.
        least_steps: steps timed per process, at least.
        peers: the installed vLLM, or None.
    """

    layers: tuple[int, ...] = (4, 80)
    shape: ModelShape = field(default_factory=ModelShape)
    max_tokens: int = 256
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    batches: tuple[int, ...] = (1, 32)
    systems: tuple[str, ...] = SYSTEMS
    repeats: int = 3
    peer_repeats: int = 1
    least_steps: int = 50
    peers: Peers | None = None


@dataclass(frozen=True)
class Cell:
    """One measurement that is due: of a system, in a phase of a round."""

    system: System
    phase: Phase
    case: Case
    batch: int = 1

    def __str__(self) -> str:
        batch = f", batch {self.batch}" if self.phase is Phase.STEPS else ""
        return f"{self.phase.value}: {self.system.name}, {self.case}{batch}"


def measure_startup(settings: StartupSettings, *, on_progress: OnProgress) -> Measured:
    """Measure everything; takes minutes to hours, and the machine to itself. Leaves nothing behind.

    Args:
        settings: what.
        on_progress: called with the cell that runs, how many are done, and how many there are.
    """
    with tempfile.TemporaryDirectory(prefix="piecework-bench-") as place:
        root = Path(place)
        on_progress("writing the models", 0, 0)
        cases = _write_models(root / "models", settings)
        systems = make_systems(settings, Launcher(root))
        notes = warm_up(systems, cases[0], on_progress=on_progress)
        cells = list(schedule(systems, cases, batches=settings.batches, repeats=settings.repeats))
        result = run_cells(cells, on_progress=on_progress)
        return replace(result, notes=(*notes, *result.notes))


def warm_up(systems: Sequence[System], case: Case, *, on_progress: OnProgress) -> tuple[str, ...]:
    """Let every system bring its files into the page cache; returns what failed, which the cells will show as well."""
    notes = []
    for system in systems:
        on_progress(f"warming up: {system.name}", 0, 0)
        try:
            system.warm_up(case)
        except CellError as error:
            notes.append(f"warming up {system.name} failed: {error.found}")
    return tuple(notes)


def make_systems(settings: StartupSettings, launcher: Launcher) -> list[System]:
    """Return the systems of the settings, in the order of SYSTEMS; vLLM only where it is installed."""
    few, all_, steps = settings.peer_repeats, settings.repeats, settings.least_steps
    made: dict[str, Callable[[], System]] = {
        "piecework": lambda: Piecework(launcher, repeats=all_, least_steps=steps),
        "torch_compile": lambda: Compiled(
            "torch_compile", launcher, rounds={Phase.COLD: few, Phase.STEPS: all_}, least_steps=steps
        ),
        "torch_regional": lambda: Compiled(
            "torch_regional", launcher, rounds={Phase.COLD: few, Phase.STEPS: few}, least_steps=steps
        ),
        "eager": lambda: Eager(launcher, rounds={Phase.WARM: all_, Phase.STEPS: few}, least_steps=steps),
    }
    if settings.peers is not None:
        peers = settings.peers
        dtype = _VLLM_DTYPE if _VLLM_DTYPE in settings.dtypes else settings.dtypes[0]
        made["vllm"] = lambda: Vllm(launcher, peers, rounds={Phase.COLD: few, Phase.WARM: all_}, dtype=dtype)
    return [make() for name, make in made.items() if name in settings.systems]


def schedule(
    systems: Sequence[System], cases: Sequence[Case], *, batches: Sequence[int], repeats: int
) -> Iterator[Cell]:
    """Yield the cells in order: rounds, in each the phases, in each the models, and for each model system after system.

    What is compared so runs close together, because a machine's speed drifts.
    """
    for round_number in range(repeats):
        for phase in Phase:
            for case in cases:
                for batch in batches if phase is Phase.STEPS else (1,):
                    for system in systems:
                        if system.takes_part(phase, round_number=round_number, dtype=case.dtype):
                            yield Cell(system, phase, case, batch)


def run_cells(cells: Sequence[Cell], *, on_progress: OnProgress) -> Measured:
    """Run cells one after the other. A system that fails with a model is not tried with it again."""
    samples: list[Sample] = []
    notes: list[str] = []
    failed: set[tuple[str, Case]] = set()
    for number, cell in enumerate(cells):
        if (cell.system.name, cell.case) in failed:
            continue
        on_progress(str(cell), number, len(cells))
        try:
            samples += cell.system.measure(cell.phase, cell.case, batch=cell.batch)
        except CellError as error:
            failed.add((cell.system.name, cell.case))
            notes.append(f"{cell} failed: {error.found}")
    return Measured(summarise(samples), tuple(notes), frozenset(name for name, _ in failed))


def _write_models(root: Path, settings: StartupSettings) -> list[Case]:
    cases = []
    for dtype in settings.dtypes:
        for layers in settings.layers:
            directory = root / f"llama-{layers}-{dtype}"
            write_llama(directory, shape=settings.shape, layers=layers, dtype=dtype)
            cases.append(Case(directory, layers, dtype, settings.max_tokens))
    return cases
