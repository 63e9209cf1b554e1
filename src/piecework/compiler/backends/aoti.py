"""Compile one piece with AOTInductor, inside a worker process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from piecework.bundle.packings import MKLDNN_LINEAR, OWN
from piecework.compiler.backends.interfaces import interface_of
from piecework.compiler.backends.rebuild import rebuild
from piecework.compiler.backends.toolchain import Toolchain, flags_of, libraries_of, sources_of
from piecework.compiler.backends.vector_exp import exp_source
from piecework.compiler.job import Job
from piecework.compiler.passes.native_matmul import native_matmul, plain_matmul
from piecework.compiler.passes.pack_linear import pack_linear
from piecework.errors import CompileError, InternalError, PieceworkError, ShapeContractError
from piecework.foundation import torch_private
from piecework.foundation.digests import canonical_json
from piecework.foundation.notes import INTERFACE, KERNELS, append_note
from piecework.foundation.traffic import Kernel, kernels_to_json
from piecework.ops.ir.program import Program
from piecework.ops.ir.resolve import resolve_target
from piecework.providers.discovery import load_operators

_OPTIONS: Mapping[str, Any] = {
    # else Inductor writes the values of scalars and of vectors of up to 8 elements into the code; ours have none yet
    "always_keep_tensor_constants": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.precompile_headers": False,
    "cpp.dynamic_threads": True,
}
_FEW_ROWS: Mapping[str, Any] = {"cpp.threads": 64, "cpp.min_chunk_size": 64}
"""For programs that compute each element by itself: their loops are divided along rows and columns together, and not
along rows only, so that one row keeps all cores busy. Inductor decides that by the number of threads it is told; how
many run is decided when they do. (A sum along a row stays with one thread: waiting for each other costs more.)"""

# a wrapper calls kernels and checks sizes: at the kernels' level it takes a fifth longer to compile, and runs no faster
_WRAPPER_BEGINS = '#pragma GCC push_options\n#pragma GCC optimize ("O1")'
_WRAPPER_ENDS = "#pragma GCC pop_options"

_MOVES: frozenset[str] = frozenset(
    f"aten.{name}" for name in ("_to_copy", "clone", "expand", "permute", "select", "slice", "unsqueeze", "view")
)


def compile_piece(job: Job, *, directory: Path, toolchain: Toolchain) -> Path:
    """Compile `job` in `directory` and return the shared library.

    Raises ShapeContractError where Inductor narrows a size, CompileError where Inductor or the C++ compiler fails.
    """
    session = torch_private.SymbolicSession()
    onednn, own = job.packed(MKLDNN_LINEAR), job.packed(*OWN)
    native = native_matmul(job.program, constants=own)
    program = pack_linear(native.program, constants=onednn)
    load_operators(call.target for call in program.calls)
    module, inputs = rebuild(program, ranges=job.ranges, session=session)
    options = {**_OPTIONS, **({"aot_inductor.embed_kernel_binary": True} if _on_cuda(job) else {})}
    options |= _FEW_ROWS if _by_element(program) else {}
    output = directory / "piece.so"
    before = native.source + exp_source(program)
    build = _AsGenerated(toolchain, directory) if _on_cuda(job) else _one_unit(toolchain, directory, before)
    told: list[list[Kernel]] = []  # on a GPU a graph is generated twice; after an attempt that didn't fit as well
    try:
        options |= native.options
        made = _compile(module, inputs, output=output, options=options, build=build, told=told, session=session)
    except _DoesNotFit:
        plain = pack_linear(plain_matmul(job.program, constants=own), constants=onednn)
        module, inputs = rebuild(plain, ranges=job.ranges, session=session)
        made = _compile(module, inputs, output=output, options=options, build=None, told=told, session=session)
    guards = session.narrowing_guards()
    if guards:
        raise ShapeContractError(
            asked="an artifact for the whole of its range of sizes",
            found="Inductor's code holds only where " + " and ".join(sorted({g.expr for g in guards})[:4]),
            try_="declare a range in which that holds, or give shape ranges that separate the cases",
            location=next((g.location for g in guards if g.location), ""),
        )
    if told:
        append_note(made, canonical_json(kernels_to_json(told[-1])).decode(), mark=KERNELS)
    called = [path for path in directory.rglob("*.json") if not path.stem.endswith("_metadata")]
    if called:  # Inductor describes operators that are called; of several files, an attempt before left the others
        torch_private.append_calls(made, max(called, key=lambda path: path.stat().st_mtime_ns).read_text())
    append_note(made, canonical_json(interface_of(job).to_json()).decode(), mark=INTERFACE)
    return made


def _compile(
    module: torch.fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    *,
    output: Path,
    options: Mapping[str, Any],
    build: Callable[[str, str, Path], bool] | None,
    told: list[list[Kernel]],
    session: torch_private.SymbolicSession,
) -> Path:
    try:
        return torch_private.compile_aoti(
            module,
            inputs,
            output=output,
            options=options,
            build=build,
            on_kernels=told.append,
            size_names=session.symbol_names,
        )
    except Exception as error:  # whatever Inductor raises; it wraps what `build` raises
        raise _meant(error) from error


def _meant(error: BaseException) -> Exception:
    """Return the error of ours that an error of Inductor's wraps, else a CompileError that tells it."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, (PieceworkError, _DoesNotFit)):
            return inner
        inner = inner.__cause__ or inner.__context__
    return CompileError(
        asked="compile a piece with AOTInductor",
        found=f"{type(error).__name__}: {str(error).strip()[:500]}",
        try_="compile with --backend eager; if that works, report the piece that `--debug` prints",
    )


def warm_up(*, directory: Path) -> None:
    """Run a tiny piece through Inductor's Python without compiling C++, so that processes forked later start warm."""
    from piecework.ops.ir.program import Call, TensorSpec  # noqa: PLC0415  in workers only

    x = TensorSpec(("s0", 32), (32, 1), "float32", "cpu")
    w = TensorSpec((32, 32), (32, 1), "float32", "cpu")
    calls = (
        Call("piecework.linear.default", ({"i": 0}, {"c": 0}), {}),
        Call("aten.silu.default", ({"n": 0},), {}),
        Call("aten.mean.dim", ({"n": 1}, [-1], True), {}),
        Call("aten.mul.Tensor", ({"n": 1}, {"n": 2}), {}),
    )
    program = Program((("s0", 1, 512),), (x,), (w,), calls, ({"n": 3},))
    session = torch_private.SymbolicSession()
    module, inputs = rebuild(pack_linear(program, constants=frozenset({0})), ranges={}, session=session)
    torch_private.compile_aoti(
        module,
        inputs,
        output=directory / "warm.so",
        options=_OPTIONS,
        build=lambda kind, command, target: _touch(target),
    )


def _touch(target: Path) -> bool:
    target.write_bytes(b"\x00" * 2048)
    return True


def _by_element(program: Program) -> bool:
    """Whether each element of the results is computed from elements of the inputs, without sums or products of rows."""
    return all(
        call.target.rpartition(".")[0] in _MOVES
        or torch.Tag.pointwise in getattr(resolve_target(call.target), "tags", ())
        for call in program.calls
    )


def _on_cuda(job: Job) -> bool:
    return any(spec.device == "cuda" for spec in (*job.program.inputs, *job.program.constants))


def _one_unit(toolchain: Toolchain, directory: Path, before: str) -> _OneUnit:
    return _OneUnit(toolchain, directory, torch_private.aoti_interface_source(), before)


class _DoesNotFit(Exception):
    """What Inductor generated is not laid out as expected: let Inductor compile it by itself."""


@dataclass(frozen=True)
class _AsGenerated:
    """Builds a piece's files as Inductor would, but for the stand-in of toolchain.py."""

    toolchain: Toolchain
    directory: Path

    def __call__(self, kind: str, command: str, target: Path) -> bool:
        if kind == "link" or any(s.suffix != ".cpp" for s in sources_of(command)):
            return False
        try:
            self.toolchain.compile_as_generated(command, directory=self.directory)
        except CompileError as error:
            raise _DoesNotFit(str(error)) from error
        return True


@dataclass
class _OneUnit:
    """Collects a piece's generated files and builds them as one translation unit (see toolchain.py)."""

    toolchain: Toolchain
    directory: Path
    interface: str
    before: str
    sources: list[Path] = field(default_factory=list)
    flags: tuple[str, ...] = ()

    def __call__(self, kind: str, command: str, target: Path) -> bool:
        if kind == "link":
            self._link(command, target)
            return True
        source = sources_of(command)[0]
        if source.suffix == ".S":
            return False
        if source.suffix != ".cpp" or not target.name.endswith((".wrapper.o", ".kernel.o")):
            raise _DoesNotFit(source.name)
        flags = flags_of(command)
        if self.flags and flags != self.flags:
            raise _DoesNotFit("flags differ between wrapper and kernels")
        self.flags = flags
        self.sources.append(source)
        target.write_bytes(b"")  # Inductor removes it after linking
        return True

    def _link(self, command: str, target: Path) -> None:
        texts = [s.read_text() for s in self.sources]
        with_interface = [i for i, text in enumerate(texts) if self.interface.strip() in text]
        if len(with_interface) != 1 or len(texts) > 2:
            raise _DoesNotFit("the C interface is not where it was")
        wrapper = texts[with_interface[0]].replace(self.interface.strip(), "")
        kernels = [text for i, text in enumerate(texts) if i != with_interface[0]]
        wrapper_first = [_WRAPPER_BEGINS, wrapper, _WRAPPER_ENDS, *kernels] if kernels else [wrapper]
        unit = self.directory / "piece.cpp"
        unit.write_text("\n".join([self.before, *wrapper_first]))
        try:
            self.toolchain.compile(unit, flags=self.flags, target=self.directory / "piece.o")
            runtime = self.toolchain.runtime(self.flags, interface=self.interface)
        except CompileError as error:
            raise _DoesNotFit(str(error)) from error
        weights = [
            s for s in sources_of(command) if s.name.endswith(".weights.o") or s.parent.name != target.parent.name
        ]
        weights = [w for w in weights if not w.name.endswith((".wrapper.o", ".kernel.o"))]
        if not weights:
            raise InternalError("Inductor made no object for constants")
        self.toolchain.link(
            [self.directory / "piece.o", runtime, *weights], libraries=libraries_of(command), target=target
        )
