import re
from pathlib import Path

import pytest

from benchmarks.common import machine as machine_module
from benchmarks.common.machine import commit, machine, versions
from piecework.foundation.version import VERSION


def test_of_given_files(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A CPU: fast\nmodel name\t: Another\n")
    (tmp_path / "meminfo").write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\n")
    (tmp_path / "release").write_text('NAME="X"\nPRETTY_NAME="X Linux 1"\n')
    told = machine(cpuinfo=tmp_path / "cpuinfo", meminfo=tmp_path / "meminfo", release=tmp_path / "release")
    assert told["cpu"] == "A CPU: fast"
    assert told["memory_gib"] == 16.0
    assert told["isa"]
    assert str(told["os"]).startswith("X Linux 1, ")


def test_without_those_files(tmp_path: Path) -> None:
    none = tmp_path / "none"
    told = machine(cpuinfo=none, meminfo=none, release=none)
    assert told["cpu"]
    assert told["memory_gib"] is None
    assert told["cores"]


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    told = versions()
    assert told["piecework"] == VERSION
    assert re.match(r"\d+\.\d+", told["torch"])
    assert re.match(r"\d+\.\d+", told["transformers"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert versions()["compiler"].startswith("none: ")


def test_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"[0-9a-f]{12}\+?", commit() or "0" * 12)
    monkeypatch.setattr(machine_module, "_ROOT", tmp_path)
    assert commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
