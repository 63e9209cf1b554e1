"""What a measured system is: it measures a model in each of three phases, by running processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from piecework.bench.measurements import Key, Sample


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
    """A system that is measured.

    Args:
        name: as the rows have it.
        rounds: in how many rounds it takes part in each phase; a phase that is not there it has none of.
        dtypes: those of the run that it is measured with; empty means all.
    """

    def __init__(self, name: str, *, rounds: Mapping[Phase, int], dtypes: tuple[str, ...] = ()) -> None:
        self.name = name
        self._rounds = rounds
        self._dtypes = dtypes

    def takes_part(self, phase: Phase, *, round_number: int, dtype: str) -> bool:
        """Whether it is measured in a phase of a round (from 0) with a dtype."""
        return round_number < self._rounds.get(phase, 0) and (not self._dtypes or dtype in self._dtypes)

    def warm_up(self, case: Case) -> None:  # noqa: B027  most need none of their own
        """Run, unmeasured, what brings the system's files into the page cache."""

    @abstractmethod
    def measure(self, phase: Phase, case: Case, *, batch: int) -> list[Sample]:
        """Measure a phase; `batch` is for `Phase.STEPS`. Raises CellError."""

    def sample(self, case: Case, metric: str, value: float, *, batch: int | None = None, note: str = "") -> Sample:
        """Return a sample of this system."""
        return Sample(Key(self.name, case.layers, metric, case.dtype, batch), value, note)
