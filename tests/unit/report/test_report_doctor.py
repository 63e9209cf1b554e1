import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from piecework.foundation.cpus import Cpus
from piecework.foundation.target import make_target
from piecework.providers.known import OURS, KnownProvider
from piecework.report import Check, DoctorReport, Status
from piecework.report.doctor import (
    check_compiler,
    check_cpu,
    check_package,
    check_provider,
    check_python,
    check_store,
    check_threads,
    check_torch,
)

Usage = namedtuple("Usage", "total used free")


def command(path: Path, script: str) -> str:
    """Make an executable that plays a compiler."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_python() -> None:
    assert check_python((3, 10, 9)).status is Status.MISSING
    assert check_python((3, 11, 0)).status is Status.OK


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("not installed", Status.MISSING),
        ("2.10.1", Status.MISSING),
        ("nightly", Status.MISSING),
        ("2.11.0+cpu", Status.OK),
        ("2.13.0+cu130", Status.OK),
        ("2.14.0.dev20260101", Status.SLOW),
        ("3.0.0", Status.SLOW),
    ],
)
def test_torch(version: str, status: Status) -> None:
    check = check_torch(version)
    assert check.status is status
    assert (check.fix == "") == (status is Status.OK)


def test_packages() -> None:
    assert check_package("tokenizers", version="0.23").status is Status.OK
    assert check_package("tokenizers", version="not installed").fix == "pip install tokenizers"


def test_providers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = KnownProvider("fast", "fast:register", "no_such_kernels", ("no-such-kernels",))
    assert check_provider(absent) == Check(
        "provider fast", Status.ABSENT, "the package no_such_kernels is not installed"
    )
    assert check_provider(OURS[0]) == Check("provider aten", Status.OK, "torch's own operators")
    (tmp_path / "such_kernels.py").write_text("raise ValueError")
    (tmp_path / "such_kernels-1.5.dist-info").mkdir()
    (tmp_path / "such_kernels-1.5.dist-info" / "METADATA").write_text("Name: such-kernels\nVersion: 1.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    there = KnownProvider("fast", "fast:register", "such_kernels", ("other-name", "such-kernels"))
    assert check_provider(there) == Check("provider fast", Status.OK, "such-kernels 1.5")
    report = DoctorReport((check_provider(absent), Check("torch", Status.OK, "2.13.0")))
    assert report.is_usable
    assert report.to_text().splitlines()[1] == "ok       torch         2.13.0"


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ("sse2", Status.SLOW),
        ("avx2 fma", Status.OK),
        ("fma avx512f avx512bw avx512vl avx512dq avx512_bf16", Status.OK),
    ],
)
def test_cpu(flags: str, status: Status) -> None:
    check = check_cpu(make_target("x86_64", system="linux", flags=frozenset(flags.split())))
    assert check.status is status


@pytest.mark.parametrize(
    ("cpus", "load", "status", "text"),
    [
        (Cpus(allowed=8, physical=4), 0.5, Status.OK, "4: 4 physical cores of 8 CPUs"),
        (Cpus(allowed=8, physical=4), 9.0, Status.SLOW, "load average 9.0 on 8 CPUs"),
        (Cpus(allowed=8, physical=4, quota=1.5), 0.0, Status.SLOW, "the CPU quota is 1.5 of 4 cores"),
        (Cpus(allowed=8, physical=4, quota=6.0), 0.0, Status.OK, "CPU quota 6"),
    ],
)
def test_threads(cpus: Cpus, load: float, status: Status, text: str) -> None:
    check = check_threads(cpus, load=load, given=False)
    assert check.status is status
    assert text in f"{check.found}; {check.fix}"
    assert check_threads(cpus, load=load, given=True).found.startswith("OMP_NUM_THREADS")


def test_no_compiler() -> None:
    check = check_compiler(None, find=lambda name: None)
    assert check.status is Status.MISSING
    assert "apt-get install g++" in check.fix
    assert "nosuch" in check_compiler("nosuch -v", find=lambda name: None).found


def test_a_compiler_that_works(tmp_path: Path) -> None:
    path = command(tmp_path / "cxx", 'echo "$@" > "$0.arguments"')
    assert check_compiler(f"{path} -m64").status is Status.OK
    arguments = (tmp_path / "cxx.arguments").read_text().split()
    assert arguments[0] == "-m64"
    assert "-shared" in arguments


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    path = command(tmp_path / "cxx", "echo note >&2; echo 'fatal error: omp.h: not found' >&2; exit 1")
    check = check_compiler(path)
    assert check.status is Status.MISSING
    assert check.found == f"{path} fails: fatal error: omp.h: not found"
    assert "ended with code 3" in check_compiler(command(tmp_path / "quiet", "exit 3")).found


def test_a_compiler_that_hangs(tmp_path: Path) -> None:
    check = check_compiler(command(tmp_path / "cxx", "exec sleep 30"), timeout_s=0.1)
    assert check.status is Status.MISSING
    assert "took more than" in check.found


def test_a_compiler_that_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "cxx").write_bytes(b"\x00")
    check = check_compiler("cxx", find=lambda name: str(tmp_path / name))
    assert check.status is Status.MISSING


def test_store_leaves_no_trace(tmp_path: Path) -> None:
    assert check_store(tmp_path / "new" / "store").name == "cache directory"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("free", "status"), [(1 << 20, Status.MISSING), (500 << 20, Status.SLOW), (2 << 30, Status.OK)]
)
def test_free_space(free: int, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))
    assert check_store(tmp_path).status is status


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    check = check_store(tmp_path / "file" / "store")
    assert check.status is Status.MISSING
    assert check.fix


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="this system doesn't say how a file system is mounted")
def test_a_store_that_no_library_can_be_loaded_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 1 << 40))
    assert "noexec" in check_store(tmp_path).found


def test_report() -> None:
    report = DoctorReport(
        checks=(Check("a", Status.OK, "fine"), Check("b", Status.SLOW, "so so", fix="buy"), Check("c", Status.OK, "x"))
    )
    assert report.is_usable
    assert not DoctorReport(checks=(*report.checks, Check("d", Status.MISSING, "none", fix="get"))).is_usable
    assert json.loads(json.dumps(report.to_json()))["checks"][1] == {
        "name": "b",
        "status": "slow",
        "found": "so so",
        "fix": "buy",
    }
    assert [line.split() for line in report.to_text().splitlines()][1:3] == [["slow", "b", "so", "so"], ["→", "buy"]]


def test_python_of_this_process_will_do() -> None:
    assert check_python(sys.version_info[:3]).status is Status.OK
