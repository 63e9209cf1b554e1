from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.contention import CpuTimes, read_cpu_times, share_of_others


def test_what_neither_idles_nor_is_ours_is_others() -> None:
    before, after = CpuTimes(100.0, 40.0, 5.0), CpuTimes(120.0, 52.0, 12.0)
    assert share_of_others(before, after) == pytest.approx(5 / 20)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, CpuTimes(1.0, 1.0, 0.0)),
        (CpuTimes(1.0, 1.0, 0.0), None),
        (CpuTimes(1.0, 1.0, 0.0), CpuTimes(1.0, 1.0, 0.0)),
        (CpuTimes(1.0, 1.0, 0.0), CpuTimes(2.0, 1.5, 0.9)),  # readings are not of the same moment
    ],
)
def test_nobody(before: CpuTimes | None, after: CpuTimes | None) -> None:
    assert share_of_others(before, after) == 0.0


def test_the_system_says() -> None:
    before = read_cpu_times()
    subprocess.run([sys.executable, "-S", "-c", "sum(range(3_000_000))"], check=True)
    after = read_cpu_times()
    assert before is not None
    assert after is not None
    assert after.total_s >= after.busy_s > 0
    assert after.ours_s > before.ours_s


@pytest.mark.parametrize("text", ["", "cpu 1 2 3", "cpu a b c d e f g h"])
def test_a_system_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "stat").write_text(text)
    assert read_cpu_times(tmp_path / "stat") is None
    assert read_cpu_times(tmp_path / "none") is None
