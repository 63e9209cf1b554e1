"""What a cold start must not do before its workers run, and what they must not do at all."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from piecework.compiler.backends.toolchain import find_toolchain
from piecework.foundation.torch_private.inductor import compiler_knows

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def test_workers_can_start_before_torch_is_imported() -> None:
    code = "import sys, piecework.compiler.model; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_worker_imports_torch_after_it_has_turned_the_collector_off() -> None:
    code = "import sys, piecework.compiler.backends.worker; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@needs_compiler
def test_the_compiler_is_asked_which_flags_it_knows() -> None:
    assert compiler_knows("-O1 -fno-strict-aliasing")
    assert not compiler_knows("-O1 -mno-such-instructions")


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("readelf") is None, reason="needs Linux and readelf")
def test_a_piece_is_linked_with_a_stand_in_and_loads_the_real_library(tmp_path: Path) -> None:
    source, piece, library = tmp_path / "piece.cpp", tmp_path / "piece.o", tmp_path / "piece.so"
    source.write_text('extern "C" int of_torch(); extern "C" int piece() { return of_torch(); }')
    subprocess.run(["g++", "-fPIC", "-c", source, "-o", piece], check=True)
    toolchain = find_toolchain(tmp_path / "toolchain", compiler="g++")
    toolchain.link([piece], libraries=("-ltorch", "-ltorch_cpu", "-L/nowhere"), target=library)
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "[libtorch_cpu.so]" in needed
    assert "[libtorch.so]" not in needed
    assert str(tmp_path) not in needed
