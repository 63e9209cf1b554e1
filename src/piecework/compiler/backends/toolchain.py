"""The C++ side of a compile: one precompiled prefix and one runtime object per machine, then one small file per piece.

Inductor writes, for every piece, a wrapper of which about 650 lines are the same C interface, compiles it apart from
its kernels, and spends most of the time on headers. Here the interface is compiled once per toolchain (`runtime.o`),
the headers are precompiled once (`prefix.h.gch`), and wrapper and kernels of a piece are one translation unit. What
Inductor generates is not changed. Where any of this doesn't fit (another compiler, an unknown flag, other headers), the
caller falls back to Inductor's own commands. A stand-in for torch's library, which has its name and no symbols, is what
pieces are linked with: to read those of the real one takes longer than all the rest of linking.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from piecework.errors import CompileError, StoreError
from piecework.foundation import files, leases
from piecework.foundation.digests import digest_json
from piecework.foundation.environment import child_variables
from piecework.foundation.flight import OVERTAKE_S, leading
from piecework.foundation.leases import Holder, Lease
from piecework.foundation.target import NATIVE, Target, read_target
from piecework.foundation.watch import watched

# `model_base.h` parses "cpu" or "cuda:1" with std::regex, whose templates are most of a wrapper's compile time. With
# libstdc++ the header is kept out, and a class with the same interface stands in for those three names.
_STAND_IN = """#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <iostream>
#include <locale>
#include <map>
#include <memory>
#include <sstream>
#include <stack>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>
#if defined(__GLIBCXX__) && !defined(_GLIBCXX_REGEX)
#define _GLIBCXX_REGEX 1
namespace std {
struct piecework_group {
  bool matched = false;
  string text;
  const string& str() const { return text; }
};
struct smatch {
  piecework_group groups[4];
  const piecework_group& operator[](size_t i) const { return groups[i]; }
};
struct regex {
  explicit regex(const char*) {}
};
inline bool regex_match(const string& device, smatch& match, const regex&) {
  const auto colon = device.find(':');
  match.groups[1] = {true, device.substr(0, colon)};
  if (colon != string::npos) {
    match.groups[3] = {true, device.substr(colon + 1)};
    if (match.groups[3].text.find_first_not_of("0123456789") != string::npos) return false;
  }
  const string& kind = match.groups[1].text;
  return kind == "cpu" || kind == "cuda" || kind == "xpu" || kind == "mps";
}
}  // namespace std
#endif
"""
_PREFIX = (
    _STAND_IN
    + """#include <torch/csrc/inductor/aoti_include/cpu.h>
#include <torch/csrc/inductor/cpp_prefix.h>
"""
)
_RUNTIME_LEVEL = "-O1"  # it passes pointers on: what counts is how long it takes to compile

KERNEL_FLAGS: tuple[str, ...] = (
    *("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-s", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-strict-aliasing", "-Wl,-z,noexecstack"),
)
"""How our own kernels (providers/) are built."""

_ENDS_WITH_PARENT = """
import ctypes, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # when the thread that started us is gone
sys.exit(subprocess.call(sys.argv[2:]) if os.getppid() == int(sys.argv[1]) else 1)
"""
"""Runs a command as the leader of a group, and ends the group with the process that asked for it, however that went."""

_MOST_SHOWN = 160
_TORCH = "-ltorch_cpu"  # has all that a piece calls
_KEPT = ("-D", "-f", "-m", "-std=")
_DROPPED = frozenset({"-fno-omit-frame-pointer", "-fPIC"})


@dataclass(frozen=True)
class Toolchain:
    """Builds pieces' libraries under `root`, a directory that may be shared by processes and kept between compiles.

    `machine` is what tells the compiler which CPU its code is for: `Target.compiler_flags`.
    """

    root: Path
    compiler: str
    version: str
    overtake_s: float = OVERTAKE_S
    machine: tuple[str, ...] = NATIVE

    def prefix(
        self, flags: tuple[str, ...], *, on_start: Callable[[subprocess.Popen[str]], None] | None = None
    ) -> Path:
        """Return the header to include first, with its precompiled form beside it; builds it on first use.

        `on_start` is given the compiler's process, so that it can be ended. Raises CompileError where the compiler
        fails on torch's headers.
        """
        flags = self._for_machine(flags)
        place = self._place(flags) / "prefix"
        with self._making(place) as made:
            if made is not None:
                (made / "prefix.h").write_text(_PREFIX)
                command = [*flags, "-O3", "-x", "c++-header", "prefix.h", "-o", "prefix.h.gch"]
                self._run(command, cwd=made, on_start=on_start)
        return place / "prefix.h"

    def runtime(
        self,
        flags: tuple[str, ...],
        *,
        interface: str,
        on_start: Callable[[subprocess.Popen[str]], None] | None = None,
    ) -> Path:
        """Return the object file with the C interface (`interface` is its source) that every library gets.

        `on_start` is as for `prefix`.
        """
        flags = self._for_machine(flags)
        place = self._place(flags) / f"runtime-{digest_json([interface, _RUNTIME_LEVEL])[:16]}"
        with self._making(place) as made:
            if made is not None:
                (made / "stand_in.h").write_text(_STAND_IN)
                (made / "runtime.cpp").write_text(interface)
                source = ["-include", "stand_in.h", "-c", "runtime.cpp"]
                self._run([*flags, _RUNTIME_LEVEL, *source, "-o", "runtime.o"], cwd=made, on_start=on_start)
        return place / "runtime.o"

    def compile(self, source: Path, *, flags: tuple[str, ...], target: Path) -> None:
        """Compile one piece's C++ file."""
        prefix = self.prefix(flags)
        self._run(
            [*self._for_machine(flags), "-O3", "-include", str(prefix), "-c", str(source), "-o", str(target)],
            cwd=source.parent,
        )

    def compile_as_generated(self, command: str, *, directory: Path) -> None:
        """Run one of Inductor's own compile commands, with nothing changed but the stand-in for std::regex."""
        header = directory / "stand_in.h"
        header.write_text(_STAND_IN)
        self._run(["-include", str(header), *shlex.split(command)[1:]], cwd=directory)

    def link(self, objects: list[Path], *, libraries: tuple[str, ...], target: Path) -> None:
        """Link object files into a shared library without symbols or unused sections."""
        options = ["-shared", "-fPIC", "-s", "-Wl,--gc-sections", "-Wl,-z,noexecstack"]
        if _TORCH in libraries:
            own = [library for library in libraries if not library.startswith("-ltorch")]
            libraries = (f"-L{self._stand_ins()}", *own, "-Wl,--no-as-needed", _TORCH)
        self._run([*options, *map(str, objects), *libraries, "-o", str(target)], cwd=target.parent)

    def _stand_ins(self) -> Path:
        """Return a directory with a library that has the name of torch's and no symbols."""
        place = self.root / f"stand-ins-{digest_json([self.compiler, self.version])[:16]}"
        with self._making(place) as made:
            if made is not None:
                name = f"lib{_TORCH.removeprefix('-l')}.so"
                command = ["-shared", "-nostdlib", f"-Wl,-soname,{name}", "-x", "c++", os.devnull, "-o", name]
                self._run(command, cwd=made)
        return place

    def compile_kernel(
        self,
        source: Path,
        *,
        macros: tuple[str, ...],
        target: Path,
        on_start: Callable[[subprocess.Popen[str]], None] | None = None,
    ) -> None:
        """Compile and link one of our own C++ files; `on_start` is as for `prefix`."""
        defines = [f"-D{macro}" for macro in macros]
        command = [*self._for_machine(KERNEL_FLAGS), *defines, str(source), "-o", str(target)]
        self._run(command, cwd=target.parent, on_start=on_start)

    def _for_machine(self, flags: tuple[str, ...]) -> tuple[str, ...]:
        """Return the flags, where it is not this machine without those that would allow its other instructions."""
        if self.machine == NATIVE:
            return flags
        return (*(f for f in flags if not f.startswith("-m")), *self.machine)

    def _place(self, flags: tuple[str, ...]) -> Path:
        return self.root / digest_json([self.compiler, self.version, flags, _PREFIX])[:24]

    @contextlib.contextmanager
    def _making(self, place: Path) -> Iterator[Path | None]:
        """Give an empty directory, which becomes `place` after the block, to the one process that is to fill it."""

        def take(key: str, *, over: Holder | None = None) -> Lease | Holder:
            return leases.take(place.with_name(f"{key}.lock"), over=over)

        with leading(place.name, take, is_made=place.exists, overtake_s=self.overtake_s) as leads:
            if not leads:
                yield None
                return
            with files.scratch(self.root) as scratch:
                made = scratch / place.name
                made.mkdir()
                yield made
                files.publish_directory(made, to=place, existing=files.Existing.KEEP)

    def _run(
        self, arguments: list[str], *, cwd: Path, on_start: Callable[[subprocess.Popen[str]], None] | None = None
    ) -> None:
        command = [*shlex.split(self.compiler), "-w", "-fPIC", *arguments]
        shown = f"… {shlex.join(command)[-_MOST_SHOWN:]}"  # its end names the files
        if on_start is not None and sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _ENDS_WITH_PARENT, str(os.getpid()), *command]
        process = subprocess.Popen(
            command,
            cwd=cwd,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=on_start is not None,
            env=child_variables({"TMPDIR": str(cwd)}),  # where what is left after a kill is removed
        )
        if on_start is not None:
            on_start(process)
        with watched(lambda: f"the C++ compiler, process {process.pid}: {shown}"):
            _, said = process.communicate()
        if process.returncode:
            if "No space left" in said:
                raise StoreError(asked="compile a piece", found="no space left on the disk", try_="free some space")
            errors = [line for line in said.splitlines() if "error" in line] or said.splitlines()
            raise CompileError(
                asked=f"compile C++ with {self.compiler}",
                found=f"it failed: {' / '.join(errors[:3])[:600]}",
                try_="run `piecework doctor`; another compiler can be named with CXX",
            )


def find_toolchain(root: Path, *, compiler: str | None, overtake_s: float = OVERTAKE_S) -> Toolchain:
    """Find the C++ compiler (`compiler`, else g++ or clang++ on PATH).

    `compiler` may have arguments, as CXX may ("ccache g++").

    Raises CompileError where there is none or it doesn't run, PieceworkError where `PIECEWORK_ISA` is not to be had.
    """
    candidates = [compiler] if compiler else ["g++", "clang++", "c++"]
    try:
        shlex.split(compiler or "")
    except ValueError as error:
        raise CompileError(
            asked=f"compile the model's pieces with the C++ compiler {compiler}",
            found=f"no command: {error}",
            try_="a compiler's name or path in CXX, with arguments if need be",
        ) from error
    found = next((c for c in candidates if shutil.which(next(iter(shlex.split(c)), ""))), None)
    if found is None:
        raise CompileError(
            asked="compile the model's pieces with a C++ compiler",
            found=f"none of {', '.join(candidates)} on PATH",
            try_="install g++ (Debian, Ubuntu: apt-get install g++), or name a compiler with CXX",
        )
    done = subprocess.run([*shlex.split(found), "--version"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(
            asked=f"compile the model's pieces with {found}",
            found=f"`{found} --version` fails: {(done.stderr or done.stdout).strip()[:200]}",
            try_="repair it, or name another compiler with CXX",
        )
    version, machine = done.stdout.splitlines()[0], read_target().compiler_flags
    return Toolchain(root=root, compiler=found, version=version, overtake_s=overtake_s, machine=machine)


def flags_of(command: str) -> tuple[str, ...]:
    """Return those flags of one of Inductor's compile commands that change what the code means, in a fixed order."""
    words = shlex.split(command)
    flags: list[str] = []
    for i, word in enumerate(words):
        if word == "-D":
            flags.append(f"-D{words[i + 1]}")
        elif (word.startswith("-I") and "python" not in Path(word[2:]).name) or (
            word.startswith(_KEPT) and word not in _DROPPED and len(word) > 2
        ):
            flags.append(word)
    return tuple(dict.fromkeys(f for f in flags if f != "-DTORCH_INDUCTOR_PRECOMPILE_HEADERS"))


def libraries_of(command: str) -> tuple[str, ...]:
    """Return the libraries and their search paths from one of Inductor's link commands."""
    return tuple(w for w in shlex.split(command) if w.startswith(("-l", "-L")))


def sources_of(command: str) -> list[Path]:
    """Return the source and object files that a command takes in."""
    words = shlex.split(command)
    return [
        Path(w)
        for w, before in zip(words[1:], words, strict=False)
        if w.endswith((".cpp", ".S", ".o")) and before != "-o"
    ]


def likely_interface() -> str | None:
    """Return the source of AOTInductor's C interface as torch is installed here, without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    source = Path(spec.submodule_search_locations[0]) / "_inductor" / "codegen" / "aoti_runtime" / "interface.cpp"
    return source.read_text() if source.is_file() else None


def likely_flags(target: Target) -> tuple[str, ...] | None:
    """Guess, without importing torch, the flags that Inductor will use here, so that the prefix can be built meanwhile.

    A wrong guess costs a wasted build, nothing else. None where no guess is known.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations or target.machine != "x86_64" or target.system != "linux":
        return None
    include = Path(spec.submodule_search_locations[0]) / "include"
    flags = set(target.flags)
    if target.isa in {"avx512", "avx512_bf16", "amx_bf16"}:
        capability = "AVX512"
        isa = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"]
        if "avx512_vnni" in flags:
            isa.append("-mavx512vnni")
    elif target.isa == "avx2":
        capability, isa = "AVX2", ["-mavx2", "-mfma", "-mf16c"]
    else:
        return None
    if "amx_fp16" in flags:  # whether it is used depends on g++'s version
        return None
    if "amx_tile" in flags:
        isa += ["-mamx-tile", "-mamx-bf16", "-mamx-int8", *(["-mavx512bf16"] if "avx512_bf16" in flags else [])]
    defines = ["TORCH_INDUCTOR_CPP_WRAPPER", "STANDALONE_TORCH_HEADER", "C10_USING_CUSTOM_GENERATED_MACROS"]
    return (
        *(f"-D{d}" for d in [*defines, f"CPU_CAPABILITY_{capability}", "NDEBUG"]),
        *["-fno-trapping-math", "-funsafe-math-optimizations", "-ffinite-math-only", "-fno-signed-zeros"],
        *["-fno-finite-math-only", "-fno-unsafe-math-optimizations", "-fmath-errno", "-ffp-contract=off"],
        *["-fexcess-precision=fast", "-fno-tree-loop-vectorize", "-march=native", "-std=c++20", "-fopenmp"],
        f"-I{include}",
        f"-I{include}/torch/csrc/api/include",
        *isa,
    )
