"""What `benchmarks.store` looks for is found where it is."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.storing import victims
from benchmarks.storing.kills import Victim, _victim


def test_a_process_that_is_left_is_found_by_its_environment_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(victims, "_GRACE_S", 0.1)
    mark = str(tmp_path)
    assert victims.orphans(mark) == {}
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={"MARK": mark})
    assert victims.processes_of(mark).keys() == {process.pid}
    assert victims.orphans(mark).keys() == {process.pid}
    assert process.wait() == -9
    assert victims.orphans(mark) == {}


def test_victims_are_drawn_by_seed(tmp_path: Path) -> None:
    def drawn(seed: int) -> list[Victim]:
        draw = random.Random(seed)
        return [_victim(draw, tmp_path) for _ in range(40)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert {victim.kind for victim in drawn(1)} == {"compile, eager", "generate, eager", "compile, native"}
