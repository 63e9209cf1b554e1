"""The same module in torch alone: under whole-model `torch.compile`, compiled layer by layer, and eager."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final, final

from piecework.bench.launch import Caches, Launcher
from piecework.bench.measurements import Sample
from piecework.bench.systems.base import Case, Phase, System

COLD_NOTE: Final = "process start to the end of the first decode step, batch 1, Inductor's caches and TMPDIR empty"
WARM_NOTE: Final = "process start to the end of the first decode step, batch 1, Inductor's caches warm"
EAGER_NOTE: Final = "process start to the first token of a prompt of 8"


@final
class Compiled(System):
    """`torch_compile` or `torch_regional`: a static compile for each batch, kept in caches of its own."""

    def __init__(self, name: str, launcher: Launcher, *, rounds: Mapping[Phase, int], least_steps: int) -> None:
        super().__init__(name, rounds=rounds)
        self._launcher = launcher
        self._least_steps = least_steps

    def measure(self, phase: Phase, case: Case, *, batch: int) -> list[Sample]:
        """Measure a phase. Raises CellError."""
        if phase is Phase.COLD:
            figures = self._run(case, caches=self._caches(case, batch=1, fresh=True), batch=1, steps=0)
            return [self.sample(case, "cold_s", figures["first_step_s"], note=COLD_NOTE)]
        caches = self._caches(case, batch=batch, fresh=False)
        figures = self._run(case, caches=caches, batch=batch, steps=self._least_steps)
        samples = [self.sample(case, "step_ms", figures["step_ms"], batch=batch, note=_steps_note(figures))]
        if caches.warm and batch == 1:
            samples.append(self.sample(case, "first_token_s", figures["first_step_s"], note=WARM_NOTE))
        return samples

    def _caches(self, case: Case, *, batch: int, fresh: bool) -> Caches:
        return self._launcher.caches(f"{self.name}/{case.layers}-{case.dtype}-{batch}", fresh=fresh)

    def _run(self, case: Case, *, caches: Caches, batch: int, steps: int) -> Mapping[str, Any]:
        return _run_cell(self.name, self._launcher, case, caches=caches, batch=batch, steps=steps)


@final
class Eager(System):
    """The module without compilation."""

    def __init__(self, launcher: Launcher, *, rounds: Mapping[Phase, int], least_steps: int) -> None:
        super().__init__("eager", rounds=rounds)
        self._launcher = launcher
        self._least_steps = least_steps

    def measure(self, phase: Phase, case: Case, *, batch: int) -> list[Sample]:
        """Measure a phase. Raises CellError."""
        steps = self._least_steps if phase is Phase.STEPS else 0
        caches = self._launcher.caches("eager", fresh=False)
        figures = _run_cell(self.name, self._launcher, case, caches=caches, batch=batch, steps=steps)
        if phase is Phase.STEPS:
            return [self.sample(case, "step_ms", figures["step_ms"], batch=batch, note=_steps_note(figures))]
        return [self.sample(case, "first_token_s", figures["first_token_s"], note=EAGER_NOTE)]


def _run_cell(
    name: str, launcher: Launcher, case: Case, *, caches: Caches, batch: int, steps: int
) -> Mapping[str, Any]:
    words = [sys.executable, "-m", f"piecework.bench.cells.{name}", str(case.model)]
    words += ["--max-tokens", str(case.max_tokens), "--batch", str(batch), "--steps", str(steps)]
    return launcher.run(words, variables=caches.variables()).figures


def _steps_note(figures: Mapping[str, Any]) -> str:
    return f"median of {figures['steps']} steps in each of n processes"
