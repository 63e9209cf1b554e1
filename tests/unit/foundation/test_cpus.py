from __future__ import annotations

from pathlib import Path

import pytest

from piecework.foundation.cpus import Cpus, read_cpus


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_hyperthreads_share_a_core(tmp_path: Path) -> None:
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    write(tmp_path, {topology.format(cpu): f"{cpu % 2},{cpu % 2 + 2}" for cpu in range(4)})
    assert read_cpus(root=tmp_path, allowed=frozenset(range(4))) == Cpus(allowed=4, physical=2)
    assert read_cpus(root=tmp_path, allowed=frozenset({0, 1, 2})).threads == 2
    assert read_cpus(root=tmp_path, allowed=frozenset({0, 2})).threads == 1


@pytest.mark.parametrize(
    ("files", "quota", "threads"),
    [
        ({}, None, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2.5, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5, 1),
        (
            {
                "proc/self/cgroup": "0::/pods/one",
                "sys/fs/cgroup/pods/cpu.max": "300000 100000",
                "sys/fs/cgroup/pods/one/cpu.max": "max 100000",
            },
            3.0,
            3,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/\n4:cpu,cpuacct:/docker/x",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000",
            },
            4.0,
            4,
        ),
    ],
    ids=["unlimited", "version 2, none", "version 2", "less than one", "version 2, above", "version 1"],
)
def test_the_quota_limits_threads(tmp_path: Path, files: dict[str, str], quota: float | None, threads: int) -> None:
    write(tmp_path, files)
    found = read_cpus(root=tmp_path, allowed=frozenset(range(8)))
    assert (found.quota, found.threads) == (quota, threads)
    assert ("quota" in found.why) is (quota is not None)


def test_this_machine() -> None:
    assert 1 <= read_cpus().threads <= read_cpus().physical <= read_cpus().allowed
