"""Which of an engine's steps are profiled. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

DEFAULT_STEPS: Final = 32


@dataclass(frozen=True)
class ProfileOptions:
    """Which steps are profiled.

    Args:
        directory: where the trace goes, as trace-1.json or the next free number; made where it isn't there.
        steps: how many forwards; of each the file has about 30 KB, with the eager backend some 200.
        skip: how many forwards before them are left out.
    """

    directory: Path
    steps: int = DEFAULT_STEPS
    skip: int = 0
