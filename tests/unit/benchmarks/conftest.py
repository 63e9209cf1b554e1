"""Stand-ins for the processes that benchmarks run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import run
from tests.unit.benchmarks.stubs import Stub, write_stub


@pytest.fixture
def make_stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Any]], Stub]:
    """Return what stands in for this Python and for vLLM's, given the figures of each process."""

    def make(answers: Mapping[str, Any]) -> Stub:
        stub = write_stub(tmp_path / "stub", answers)
        monkeypatch.setattr(sys, "executable", str(stub.python))
        monkeypatch.setattr("tempfile.tempdir", str(stub.place / "tmp"))
        monkeypatch.setattr(run, "share_of_others", lambda before, after: 0.0)
        installed = tmp_path / "peers" / "v" / "bin"
        installed.mkdir(parents=True)
        (installed / "python").symlink_to(stub.python)
        for name in answers:
            if name.startswith("vllm") and name.endswith(".py"):
                (stub.place / name).write_text("")
        monkeypatch.setenv("PEERS_ROOT", str(tmp_path / "peers"))
        monkeypatch.setenv("PEERS_SCRIPTS", str(stub.place))
        return stub

    return make
