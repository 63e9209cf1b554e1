"""What several tests of processes need."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def run_in_processes() -> Callable[[str, int], list[str]]:
    """Return a function that runs code in several processes at once, and returns what each has printed."""

    def run(code: str, number: int) -> list[str]:
        command = [sys.executable, "-c", code]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(number)]
        printed = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * number
        return printed

    return run
