"""Compiling pieces, in worker processes only. torch 2.11-2.13.

torch/_inductor/{compile_fx,codecache,cpp_builder}.py; imports of Inductor stand inside functions.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from piecework.foundation.torch_private.scheduled_kernels import OnKernels, watching_kernels
from piecework.foundation.torch_private.symbolic import size_oblivious


def aoti_interface_source() -> str:
    """Return the C interface that AOTInductor pastes into every wrapper it generates (the same for all pieces)."""
    import torch._inductor as inductor

    root = Path(inductor.__path__[0])
    return (root / "codegen" / "aoti_runtime" / "interface.cpp").read_text()


def compile_aoti(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    output: Path,
    options: Mapping[str, Any],
    build: Callable[[str, str, Path], bool] | None,
    on_kernels: OnKernels = lambda kernels: None,
    size_names: Callable[[], Mapping[str, str]] = dict,
) -> Path:
    """Compile `module` to the AOTInductor library `output` and return its path.

    Args:
        module: a graph whose weights are parameters (`get_attr`) and whose output is a tuple.
        example_inputs: fake tensors, one per placeholder.
        options: Inductor config patches.
        build: called as `build(kind, command, target)` in place of each run of the C++ compiler ("compile" or "link");
            returns False to let Inductor do it.
        on_kernels: told of the kernels before they are generated, once or more often (see kernels.py).
        size_names: returns the sizes' names for that, by those of the symbols in the inputs' shapes.
    """
    import torch._inductor.codecache as inductor_codecache
    from torch._inductor.compile_fx import compile_fx_aot

    codecache: Any = inductor_codecache

    class Builder(codecache.CppBuilder):  # type: ignore[misc]
        def build(self) -> None:
            command, target = self.get_command_line(), Path(self.get_target_file_path())
            kind = "compile" if target.suffix in {".o", ".obj"} else "link"
            if build is None or not build(kind, command, target):
                super().build()

    original = codecache.CppBuilder
    codecache.CppBuilder = Builder
    try:
        with (
            torch.no_grad(),
            size_oblivious(),
            _general_strides(),
            _general_stride_order(),
            _weights_without_values(),
            watching_kernels(on_kernels, names=size_names),
        ):
            result: Any = compile_fx_aot(
                module, list(example_inputs), config_patches={**options, "aot_inductor.output_path": str(output)}
            )
    finally:
        codecache.CppBuilder = original
    return Path(result if isinstance(result, str) else next(str(f) for f in result if str(f).endswith(".so")))


@contextlib.contextmanager
def _weights_without_values() -> Iterator[None]:
    """Keep Inductor from computing with the values of weights, which they don't have yet.

    torch 2.11-2.13: `fx_passes/joint_graph.py` takes parameters of one element for known, and puts what is computed of
    them alone (`scale.exp()`) into the code as a number, `always_keep_tensor_constants` or not.
    """
    from torch._inductor.fx_passes import joint_graph

    folder: Any = joint_graph.UniformValueConstantFolder
    original = folder._deduce_value

    def deduce(self: Any, node: torch.fx.Node) -> Any:
        return self.unknown_value if node.op == "get_attr" else original(self, node)

    folder._deduce_value = deduce
    try:
        yield
    finally:
        folder._deduce_value = original


@contextlib.contextmanager
def _general_strides() -> Iterator[None]:
    """Let Inductor compute a view's strides for every size at once, not for sizes other than 1.

    torch 2.12-2.13: `ir.View.create` asks `_compute_stride` for the general answer for unbacked sizes only, and would
    guard on `size != 1` for ours; the general answer is right for 1 as well.
    """
    from torch._subclasses import fake_impls

    original = getattr(fake_impls, "_compute_stride", None)
    if original is None:
        yield
        return

    def general(old_shape: Any, old_stride: Any, new_shape: Any, size_oblivious: bool = True) -> Any:  # noqa: FBT001, FBT002  torch's own signature
        return original(old_shape, old_stride, new_shape, size_oblivious=True)

    fake_impls._compute_stride = general
    try:
        yield
    finally:
        fake_impls._compute_stride = original


@contextlib.contextmanager
def _general_stride_order() -> Iterator[None]:
    """Let Inductor order strides for every size at once, not for sizes from 2.

    torch 2.11-2.13: `ir.get_fill_order` compares strides such as 32 * n and 32, of a transposed result, and would guard
    on the answer. Where one is a multiple of the other it is the larger one; that they are equal for n = 1 doesn't
    matter, because then the order doesn't either.
    """
    import torch._inductor.ir as inductor_ir

    ir: Any = inductor_ir
    plain, symbolic = ir.argsort, ir.argsort_sym

    def argsort(seq: Sequence[Any], *, reverse: bool = False) -> list[int]:
        order = stride_order(seq)
        return (order[::-1] if reverse else order) if order is not None else plain(seq, reverse=reverse)

    def argsort_sym(shape_env: Any, seq: Sequence[Any], *, reverse: bool = False) -> list[int]:
        order = stride_order(seq)
        return (order[::-1] if reverse else order) if order is not None else symbolic(shape_env, seq, reverse=reverse)

    ir.argsort, ir.argsort_sym = argsort, argsort_sym
    try:
        yield
    finally:
        ir.argsort, ir.argsort_sym = plain, symbolic


def stride_order(strides: Sequence[Any]) -> list[int] | None:
    """Return the axes from the smallest stride to the largest, of equal ones the last axis first.

    None where that isn't the same for all sizes from 2.
    """
    import functools

    import sympy

    exprs = [sympy.sympify(s.node.expr if isinstance(s, torch.SymInt) else s) for s in strides]
    undecided = False

    def compare(i: int, j: int) -> int:
        nonlocal undecided
        a, b = exprs[i], exprs[j]
        if a == b:
            return j - i
        if a.is_Integer and b.is_Integer:
            return 1 if a > b else -1
        if a.is_zero or b.is_zero:
            return -1 if a.is_zero else 1
        numerator, denominator = sympy.cancel(a / b).as_numer_denom()
        if denominator == 1:
            return 1
        undecided = undecided or numerator != 1
        return -1

    order = sorted(range(len(exprs)), key=functools.cmp_to_key(compare))
    return None if undecided else order


def warm_up_inductor() -> None:
    """Import what Inductor needs to compile, so that processes forked afterwards have it."""
    import torch._inductor.codecache
    import torch._inductor.codegen.cpp
    import torch._inductor.codegen.cpp_wrapper_cpu
    import torch._inductor.compile_fx
    import torch._inductor.fx_passes.joint_graph
    import torch._inductor.fx_passes.post_grad
    import torch._inductor.kernel.mm  # noqa: F401


def set_inductor_options(*, trust_isa: bool, vector_bits: int | None = None) -> None:
    """Prepare this process for compiling pieces: one thread, no caches between pieces, no instruction-set probes.

    Args:
        trust_isa: believe what the CPU says of itself. torch 2.11-2.13 compile, link and load a library for each
            instruction set, and for some of its parts although `vec_isa_ok` is set (cpu_vec_isa.py); then the compiler
            is asked only whether it knows them.
        vector_bits: how wide vectors are; None for the CPU's widest.
    """
    import torch._inductor.config as config
    from torch._inductor import cpu_vec_isa

    config.compile_threads = 1
    config.fx_graph_cache = False
    config.cpp_cache_precompile_headers = False
    config.cpp.simdlen = vector_bits
    if trust_isa:
        config.cpp.vec_isa_ok = True
        isa: Any = cpu_vec_isa.VecISA
        isa.check_build = lambda self, code: compiler_knows(self.build_arch_flags())


def compiler_knows(flags: str) -> bool:
    """Whether Inductor's C++ compiler takes these flags."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    command = [get_cpp_compiler(), *flags.split(), "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
