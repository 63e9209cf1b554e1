"""Time calls that take turns, so that what slows the machine down for a while slows all of them."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from piecework.foundation.process import keep_freed_memory

_WARM_UP_STEPS: Final = 10
_MOST_STEPS: Final = 5000
_MOST_SECONDS: Final = 60.0
_TURN_SECONDS: Final = 0.05


def time_rounds(ways: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each call in each round; in a round each is called once, and a first one isn't counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begun)
    return {name: found[1:] for name, found in seconds.items()}


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step: the median of `num_steps`, and the least."""

    median: float
    least: float
    num_steps: int

    def to_json(self) -> dict[str, float]:
        """Return the times in milliseconds, for a cell's output."""
        return {
            "step_ms": round(1e3 * self.median, 4),
            "step_min_ms": round(1e3 * self.least, 4),
            "steps": self.num_steps,
        }


def time_steps(
    steps: Sequence[Callable[[], object]], *, least_steps: int, least_seconds: float, warm_up: int = _WARM_UP_STEPS
) -> list[StepTimes]:
    """Time each step, call by call, until both `least_steps` and `least_seconds` are reached, after `warm_up` calls.

    They take turns of a twentieth of a second, or of one call if that takes longer; every second round of turns goes
    the other way about. Each ends after 5000 calls or a minute in any case; the result says how many there were.
    """
    keep_freed_memory()  # as `piecework generate` does; here for every system alike
    for step in steps:
        for _ in range(warm_up):
            step()
    timed = [_Timed(step, least_steps, least_seconds) for step in steps]
    order = list(timed)
    while not all(one.done for one in timed):
        for one in order:
            one.take_turn()
        order.reverse()
    return [one.times() for one in timed]


@dataclass
class _Timed:
    """A step that is timed, and its calls so far."""

    step: Callable[[], object]
    least_steps: int
    least_seconds: float
    seconds: list[float] = field(default_factory=list)
    spent: float = 0.0

    @property
    def done(self) -> bool:
        """Whether it was called often enough, or for too long."""
        num = len(self.seconds)
        enough = num >= self.least_steps and self.spent >= self.least_seconds
        return num > 0 and (enough or num >= _MOST_STEPS or self.spent >= _MOST_SECONDS)

    def take_turn(self) -> None:
        """Call it until its turn is over."""
        clock, end = time.perf_counter, self.spent + _TURN_SECONDS
        while not self.done:
            begun = clock()
            self.step()
            self.seconds.append(clock() - begun)
            self.spent += self.seconds[-1]
            if self.spent >= end:
                return

    def times(self) -> StepTimes:
        """Sum up."""
        return StepTimes(statistics.median(self.seconds), min(self.seconds), len(self.seconds))


def emit(figures: Mapping[str, Any]) -> None:
    """Print a cell's figures as one line of JSON."""
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()
