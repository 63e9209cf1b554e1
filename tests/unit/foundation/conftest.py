"""What several tests of processes need."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def run_in_processes() -> Callable[[str, int], None]:
    """Return a function that runs code in several processes at once, each of which must end well."""

    def run(code: str, number: int) -> None:
        processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(number)]
        assert [process.wait(60) for process in processes] == [0] * number

    return run
