"""What happens when generated files are not as expected or the disk is full, with Inductor in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from piecework.compiler.backends import aoti
from piecework.compiler.backends.toolchain import Toolchain
from piecework.compiler.job import Job
from piecework.errors import StoreError
from piecework.foundation import torch_private
from piecework.ops.ir.program import Call, Program, TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch warns of itself

_SPEC = TensorSpec(("s0", 8), (8, 1), "float32", "cpu")
_PROGRAM = Program((("s0", 1, 16),), (_SPEC,), (), (Call("aten.neg.default", ({"i": 0},), {}),), ({"n": 0},))


def test_files_that_do_not_fit_are_left_to_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[bool] = []
    original = torch_private.compile_aoti

    def compile_aoti(*args: object, build: object, **options: object) -> Path:
        builds.append(build is None)
        if build is None:
            return tmp_path / "inductor's own.so"
        return original(*args, build=build, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch_private, "aoti_interface_source", lambda: "no such text")
    monkeypatch.setattr(torch_private, "compile_aoti", compile_aoti)
    made = aoti.compile_piece(Job(_PROGRAM), directory=tmp_path, toolchain=Toolchain(tmp_path, "g++", "1"))
    assert (made, builds) == (tmp_path / "inductor's own.so", [False, True])


@pytest.mark.slow
def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Path:
        raise StoreError(asked="compile a piece", found="no space left on the disk")

    monkeypatch.setattr(Toolchain, "runtime", full)
    with pytest.raises(StoreError, match="no space left"):
        aoti.compile_piece(Job(_PROGRAM), directory=tmp_path, toolchain=Toolchain(tmp_path, "g++", "1"))
