"""The one place that touches private torch API.

Each entry says what it is for, the torch versions it was tried with, and where upstream discusses it. Every entry has a
test in tests/unit/foundation/test_torch_private.py that fails when torch changes underneath it. Compiler-side imports
stand inside functions: a warm start imports this module and must not pay for Dynamo or Inductor.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# --------------------------------------------------------------------------------------------------------------------
# Running artifacts. torch 2.11-2.13; torch/csrc/inductor/aoti_runner/pybind.cpp. The public
# `torch._inductor.aoti_load_package` imports Inductor's Python (about 2.5 s), these classes don't.


def open_aoti_library(path: Path, *, device: str) -> Any:
    """Open one instance of an AOTInductor shared library on `device` ("cpu" or "cuda"); `run(list) -> list`."""
    if device == "cpu":
        return torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
    return torch._C._aoti.AOTIModelContainerRunnerCuda(str(path), 1, device, str(path.parent))


def bind_constants(runner: Any, constants: Mapping[str, torch.Tensor]) -> None:
    """Bind `constants` (name → tensor, any layout) to an instance without a copy; the caller keeps them alive."""
    runner.update_constant_buffer(dict(constants), False, True, True)


def pack_linear_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` [out, in] in oneDNN's blocked layout (an opaque mkldnn tensor of the same dtype).

    torch 2.11-2.13: `mkldnn::_reorder_linear_weight`, the op that Inductor's own freezing pass uses.
    """
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


# --------------------------------------------------------------------------------------------------------------------
# Symbolic shapes and tracing. torch 2.11-2.13; torch/fx/experimental/{symbolic_shapes,proxy_tensor}.py.


@dataclass(frozen=True)
class Guard:
    """A condition on sizes that some code needed: `expr` in terms of symbols, and the source line that asked."""

    expr: str
    location: str


class SymbolicSession:
    """A fake-tensor mode whose symbolic sizes hold for their whole declared range.

    Sizes are backed symbols without 0/1 specialisation and without duck shaping, so that any condition the trace relies
    on and that the declared range does not imply shows up as a `Guard`.

    Args:
        is_users: says of a file's name whether it is the user's code; a guard's location is the innermost such line.
    """

    def __init__(self, *, is_users: Callable[[str], bool] = lambda filename: True) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self.shape_env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
        self.fake_mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)

        def location(framework_loc: str | None = None) -> Any:
            return _innermost_line(is_users)

        self.shape_env._get_sloc = location  # type: ignore[method-assign]
        self._symbols: dict[str, Any] = {}
        self._declared: dict[Any, tuple[str, Any]] = {}  # symbol → its name and its declared range

    def size(self, name: str, *, low: int, high: int, hint: int) -> torch.SymInt | int:
        """Make (or return) the symbolic size `name` with values in [low, high]; `hint` is used for heuristics only.

        A range of one value gives that number.
        """
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic, StrictMinMaxConstraint
        from torch.utils._sympy.value_ranges import ValueRanges

        if low == high:
            return low
        if name not in self._symbols:
            source = ConstantSource(name)
            constraint = StrictMinMaxConstraint(vr=ValueRanges(low, high), warn_only=False)
            symbol = self.shape_env.create_symbol(
                hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=constraint
            )
            self._declared[symbol] = name, ValueRanges(low, high)
            self._symbols[name] = self.shape_env.create_symintnode(symbol, hint=hint, source=source)
        made: torch.SymInt = self._symbols[name]
        return made

    def expression(self, text: str, *, hints: Mapping[str, int]) -> torch.SymInt | int:
        """Turn an expression over this session's size names, such as "s0 + 1", into a SymInt (or an int)."""
        import sympy
        from torch.utils._sympy import functions

        if re.fullmatch(r"-?\d+", text):
            return int(text)
        local = {name: made.node.expr for name, made in self._symbols.items()}
        known = {name: getattr(functions, name) for name in functions.__all__}
        expr = sympy.sympify(text, locals={**known, **local})
        if expr.is_Integer:
            return int(expr)
        hint = expr.subs({local[name]: hints[name] for name in local})
        value: torch.SymInt | int = self.shape_env.create_symintnode(expr, hint=int(hint))
        return value

    def symbol_names(self) -> dict[str, str]:
        """Map the session's internal symbol names (as they appear in shapes) to the names given to `size`."""
        return {str(symbol): name for symbol, (name, _) in self._declared.items()}

    def narrowing_guards(self) -> list[Guard]:
        """Return the guards that do not hold for the whole of every declared range."""
        import sympy
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        # the session's own environment takes each guard for granted once made; a new one knows the declaration only
        unguarded = ShapeEnv(specialize_zero_one=False, duck_shape=False)
        declared = tuple((symbol, bounds) for symbol, (_, bounds) in self._declared.items())
        names = self.symbol_names()
        found = []
        for guard in self.shape_env.guards:
            if unguarded._maybe_evaluate_static(guard.expr, axioms=(), var_to_range=declared) is sympy.true:
                continue
            text = re.sub(r"\bs\d+\b", lambda m: names.get(m.group(0), m.group(0)), str(guard.expr))
            found.append(Guard(expr=text, location=str(getattr(guard, "sloc", None) or "")))
        places = getattr(self.shape_env, "replacements_slocs", {})
        for symbol, value in self.shape_env.replacements.items():
            name = names.get(str(symbol))
            if name is not None:
                found.append(Guard(expr=f"Eq({name}, {value})", location=str(places.get(symbol) or "")))
        return found


def _innermost_line(is_users: Callable[[str], bool]) -> str:
    """Return "file:line" of the innermost frame whose file `is_users`, or ""."""
    frame = sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@contextlib.contextmanager
def size_oblivious() -> Iterator[None]:
    """Let backed sizes be treated as if unknown where torch offers a general answer (broadcasting, contiguity).

    torch 2.11-2.13: `torch.fx.experimental._config.backed_size_oblivious`. It leaves out `size == 1` and `size == 0` in
    C++ (contiguity above all, equal strides), which arrive at `SymNode.guard_bool` with the name of c10/core/SymInt.h.
    There "no" is the general answer, as it is elsewhere: torch then makes a copy that size 1 would not need.
    """
    import sympy
    from torch.fx.experimental import _config
    from torch.fx.experimental.sym_node import SymNode

    config: Any = _config
    original = SymNode.guard_bool

    def guard_bool(self: Any, file: str, line: int) -> bool:
        expr = self.expr
        if file.endswith("c10/core/SymInt.h") and isinstance(expr, (sympy.Eq, sympy.Ne)) and _tells_one_apart(expr):
            answer = self.guard_or_false if isinstance(expr, sympy.Eq) else self.guard_or_true
            return bool(answer(file, line))
        return bool(original(self, file, line))

    SymNode.guard_bool = guard_bool  # type: ignore[method-assign]
    try:
        with config.patch(backed_size_oblivious=True):
            yield
    finally:
        SymNode.guard_bool = original  # type: ignore[method-assign]


def _tells_one_apart(relation: Any) -> bool:
    """Whether an equation such as `8*s0 == 8` holds where its one size is 0 or 1, and nowhere else."""
    import sympy

    difference = sympy.expand(relation.lhs - relation.rhs)
    if len(difference.free_symbols) != 1:
        return False
    (size,) = difference.free_symbols
    slope = difference.coeff(size, 1)
    rest = sympy.expand(difference - slope * size)
    return bool(slope.is_number and slope != 0 and rest.is_number and -rest / slope in (0, 1))


@dataclass(frozen=True)
class Tracer:
    """Access to the make_fx trace that is under way."""

    tracer: Any

    @property
    def graph(self) -> torch.fx.Graph:
        """The graph that is being built."""
        graph: torch.fx.Graph = self.tracer.graph
        return graph

    def node_of(self, tensor: torch.Tensor) -> torch.fx.Node | None:
        """Return the node that produced `tensor`, or None where the trace doesn't know it."""
        from torch.fx.experimental.proxy_tensor import get_proxy_slot

        slot = get_proxy_slot(tensor, self.tracer, None)
        if slot is None:
            return None
        node: torch.fx.Node = slot.proxy.node
        return node

    def attach(self, tensor: torch.Tensor, node: torch.fx.Node, *, new_sizes: bool = True) -> None:
        """Let `tensor` stand for `node` in the rest of the trace.

        With `new_sizes=False` the tensor's symbolic sizes are known to the trace already, which is quicker.
        """
        from torch.fx.experimental import proxy_tensor

        proxy = torch.fx.Proxy(node, self.tracer)
        if new_sizes:
            proxy_tensor.track_tensor_tree(tensor, proxy, constant=None, tracer=self.tracer)
        else:
            proxy_tensor.set_proxy_slot(tensor, self.tracer, proxy_tensor._ProxyTensor(proxy, None))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run a block whose operations are not traced."""
        from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

        with disable_proxy_modes_tracing():
            yield


def current_tracer() -> Tracer | None:
    """Return the innermost make_fx trace, or None outside of one."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    return None if mode is None else Tracer(mode.tracer)


def plain_tensors() -> contextlib.AbstractContextManager[None]:
    """Inside, tensors' attributes and functions skip the active TorchFunctionModes."""
    guard: contextlib.AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return guard


def trace(function: Callable[..., Any], args: Sequence[Any]) -> torch.fx.GraphModule:
    """Trace `function(*args)` on fake tensors into aten operators below autograd; names follow the operators.

    The Python dispatcher is on, because some composite operators (`matmul` in torch 2.11) ask for sizes as plain
    numbers in C++ and not in their Python form.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.experimental.proxy_tensor import make_fx

    with enable_python_dispatcher():
        module: torch.fx.GraphModule = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*args)
    return module


def functionalized(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with in-place operators replaced by functional ones (`torch.func.functionalize`)."""
    made: Callable[..., Any] = torch.func.functionalize(function, remove="mutations")
    return made


def data_dependent_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that torch raises where a trace needs a tensor's values."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode


# --------------------------------------------------------------------------------------------------------------------
# Operators and graphs. torch 2.11-2.13; torch/_ops.py (OpOverload, OpOverloadPacket), torch/fx/graph.py (Graph._root).


@dataclass(frozen=True)
class Operator:
    """What torch's registry knows of an operator: "namespace::name", its overload, whether it changes an argument."""

    name: str
    overload: str
    mutates: bool


def operator_of(target: object) -> Operator | None:
    """Return what is known of a node's target, or None where it is no registered operator (but a Python function)."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    schema = target._schema
    return Operator(name=schema.name, overload=target._overloadname, mutates=schema.is_mutable)


def operator_name(target: object) -> str | None:
    """Return "namespace::name" of an operator or of all its overloads (`torch.ops.ns.name`), or None."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name
    found = operator_of(target)
    return None if found is None else found.name


def last_node(graph: torch.fx.Graph) -> torch.fx.Node:
    """Return the node that was put into `graph` last, or its root where it has none yet."""
    return graph._root.prev


def nodes_after(graph: torch.fx.Graph, node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Yield the nodes that follow `node` (a node of `graph`, or what `last_node` gave for an empty graph)."""
    following = node.next
    while following is not graph._root:
        yield following
        following = following.next


# --------------------------------------------------------------------------------------------------------------------
# Compiling pieces, in worker processes only. torch 2.11-2.13; torch/_inductor/{compile_fx,codecache,cpp_builder}.py.


def aoti_interface_source() -> str:
    """Return the C interface that AOTInductor pastes into every wrapper it generates (the same for all pieces)."""
    import torch._inductor as inductor

    root = Path(inductor.__path__[0])
    return (root / "codegen" / "aoti_runtime" / "interface.cpp").read_text()


@dataclass(frozen=True)
class GeneratedSources:
    """What Inductor generated for one piece: its C++ files, and the commands Inductor would have used."""

    sources: dict[str, Path]
    commands: dict[str, str]
    target: Path


def compile_aoti(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    output: Path,
    options: Mapping[str, Any],
    build: Callable[[str, str, Path], bool] | None,
) -> Path:
    """Compile `module` to the AOTInductor library `output` and return its path.

    Args:
        module: a graph whose weights are parameters (`get_attr`) and whose output is a tuple.
        example_inputs: fake tensors, one per placeholder.
        options: Inductor config patches.
        build: called as `build(kind, command, target)` in place of each run of the C++ compiler ("compile" or "link");
            returns False to let Inductor do it.
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
        with torch.no_grad(), size_oblivious(), _general_strides():
            result: Any = compile_fx_aot(
                module, list(example_inputs), config_patches={**options, "aot_inductor.output_path": str(output)}
            )
    finally:
        codecache.CppBuilder = original
    return Path(result if isinstance(result, str) else next(str(f) for f in result if str(f).endswith(".so")))


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


def warm_up_inductor() -> None:
    """Import what Inductor needs to compile, so that processes forked afterwards have it."""
    import torch._inductor.codecache
    import torch._inductor.codegen.cpp
    import torch._inductor.codegen.cpp_wrapper_cpu
    import torch._inductor.compile_fx
    import torch._inductor.fx_passes.joint_graph
    import torch._inductor.fx_passes.post_grad
    import torch._inductor.kernel.mm  # noqa: F401


def set_inductor_options(*, trust_isa: bool) -> None:
    """Prepare this process for compiling pieces: one thread, no caches between pieces, no instruction-set probes."""
    import torch._inductor.config as config

    config.compile_threads = 1
    config.fx_graph_cache = False
    config.cpp_cache_precompile_headers = False
    if trust_isa:
        config.cpp.vec_isa_ok = True
