"""Leases between processes: the dead hold none, those on other hosts are known by their heartbeat."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from piecework.foundation import files, leases
from piecework.foundation.leases import Holder, Lease, remove_dead, take

HOLD = """
import sys
from pathlib import Path
from piecework.foundation.leases import take
lease = take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def lease_of(path: Path, *, over: Holder | None = None) -> Lease:
    taken = take(path, over=over)
    assert isinstance(taken, Lease), taken
    return taken


def holder_of(path: Path) -> Holder:
    taken = take(path)
    assert isinstance(taken, Holder)
    return taken


@pytest.fixture
def other_process(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that holds the lease of "k"."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "k")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_one_has_it_and_others_see_who(tmp_path: Path) -> None:
    lease = lease_of(tmp_path / "k")
    holder = holder_of(tmp_path / "k")
    assert holder.pid == os.getpid()
    assert holder.command.startswith(shlex.join(sys.orig_argv)[:100])
    assert str(holder).startswith(f"process {os.getpid()} on ")
    lease.release()
    assert os.listdir(tmp_path) == []
    lease.release()
    lease_of(tmp_path / "k").release()


def test_a_process_that_is_killed_has_none(tmp_path: Path, other_process: subprocess.Popen[str]) -> None:
    assert holder_of(tmp_path / "k").pid == other_process.pid
    other_process.kill()
    other_process.wait()
    lease_of(tmp_path / "k").release()


def test_files_of_the_dead_are_removed_and_those_of_the_living_stay(
    tmp_path: Path, other_process: subprocess.Popen[str]
) -> None:
    foreign(tmp_path / "far.lock", age_s=1)
    foreign(tmp_path / "stale.lock", age_s=leases.STALE_S + 1)
    remove_dead(tmp_path, pattern="*")
    assert sorted(os.listdir(tmp_path)) == ["far.lock", "k"]
    other_process.kill()
    other_process.wait()
    with files.scratch(tmp_path):
        before = set(os.listdir(tmp_path))
        remove_dead(tmp_path, pattern="*")
        assert set(os.listdir(tmp_path)) == before - {"k"}
    remove_dead(tmp_path / "none")


def test_a_process_that_is_stopped_is_overtaken(tmp_path: Path, other_process: subprocess.Popen[str]) -> None:
    other_process.send_signal(signal.SIGSTOP)
    holder = holder_of(tmp_path / "k")
    lease = lease_of(tmp_path / "k", over=holder)
    assert isinstance(take(tmp_path / "k", over=holder), Holder), "it was overtaken by somebody else meanwhile"
    other_process.send_signal(signal.SIGCONT)
    other_process.communicate()
    assert holder_of(tmp_path / "k").pid == os.getpid()
    lease.release()


def foreign(path: Path, *, age_s: float) -> None:
    """Write a lease as another host would."""
    path.write_text(json.dumps({"pid": 1, "host": "far", "command": "c", "kernel": "another", "nonce": "n"}))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def test_another_hosts_lease_ends_when_it_is_not_renewed(tmp_path: Path) -> None:
    foreign(tmp_path / "k", age_s=leases.STALE_S - 10)
    assert str(holder_of(tmp_path / "k")) == "process 1 on far (c)"
    foreign(tmp_path / "k", age_s=leases.STALE_S + 1)
    lease_of(tmp_path / "k").release()


def test_a_lease_that_was_renewed_is_a_living_one(tmp_path: Path) -> None:
    lease = lease_of(tmp_path / "k")
    before = (tmp_path / "k").stat().st_mtime
    os.utime(tmp_path / "k", (1, 1))
    lease.renew()
    assert (tmp_path / "k").stat().st_mtime >= before
    lease.release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_heartbeat_tells(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lease = lease_of(tmp_path / "k")
    assert holder_of(tmp_path / "k").pid == os.getpid()
    os.utime(tmp_path / "k", (1, 1))
    other = lease_of(tmp_path / "k")
    lease.release()
    assert holder_of(tmp_path / "k").pid == os.getpid(), "whoever was taken for dead leaves the other's lease alone"
    other.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_who_has_just_begun_is_let_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "k").write_bytes(content)
    assert str(holder_of(tmp_path / "k")) == "a process that has just begun"
    os.utime(tmp_path / "k", (1, 1))
    lease_of(tmp_path / "k").release()


def test_of_many_that_take_one_has_it(tmp_path: Path, run_in_processes: Callable[[str, int], None]) -> None:
    code = f"""
import time
from pathlib import Path
from piecework.foundation.leases import Lease, take
inside = Path({str(tmp_path)!r}) / "inside"
taken = 0
while taken < 100:
    lease = take(Path({str(tmp_path)!r}) / "k")
    if isinstance(lease, Lease):
        inside.mkdir()  # fails where another one is inside
        inside.rmdir()
        taken += 1
        lease.release()
    time.sleep(0.0005)
"""
    run_in_processes(code, 3)
    assert os.listdir(tmp_path) == []
