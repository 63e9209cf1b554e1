"""Tracing with make_fx. torch 2.11-2.13; torch/fx/experimental/proxy_tensor.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


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

    def keep(self, *classes: type) -> None:
        """Let objects of some classes be arguments of nodes as they are, and not attributes of the graph's root."""
        create_arg = self.tracer.create_arg
        self.tracer.create_arg = lambda value: value if isinstance(value, classes) else create_arg(value)

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

    with enable_python_dispatcher(), _lean():
        module: torch.fx.GraphModule = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*args)
    return module


@dataclass(frozen=True)
class RanCall:
    """A call of an operator that ran: with which arguments, and what it gave."""

    operator: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any


def run_and_record(function: Callable[..., Any], args: Sequence[Any]) -> tuple[list[RanCall], Any]:
    """Run `function(*args)` and return the operators below autograd that it called, and its result.

    Of a function whose tensors are small and sizes plain, it tells what `trace` does in a twentieth of the time.
    torch 2.11-2.13: torch/utils/_python_dispatch.py, torch/_dispatch/python.py.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[RanCall] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            calls.append(RanCall(func, args, kwargs or {}, result))
            return result

    with torch.no_grad(), enable_python_dispatcher(), Recording():  # type: ignore[no-untyped-call]
        result = function(*args)
    return calls, result


@contextlib.contextmanager
def _lean() -> Iterator[None]:
    """Trace without what nobody reads afterwards: Python code for the graph, and a second form of the metadata.

    torch 2.11-2.13: torch/fx/_lazy_graph_module.py; `_extract_tensor_metadata`, which for symbolic sizes takes a fifth
    of the trace.
    """
    from torch.fx import _lazy_graph_module
    from torch.fx.experimental import proxy_tensor

    made: Any = proxy_tensor
    extract = made._extract_tensor_metadata
    made._extract_tensor_metadata = lambda _tensor: None
    try:
        with _lazy_graph_module._use_lazy_graph_module(True):
            yield
    finally:
        made._extract_tensor_metadata = extract


def functionalized(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with in-place operators replaced by functional ones (`torch.func.functionalize`)."""
    made: Callable[..., Any] = torch.func.functionalize(function, remove="mutations")
    return made


def functional(value: Any) -> Any:
    """Return a tensor as `functionalized` has them, so that writes to it are replaced; anything else as it is."""
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    functions: Any = torch._C._functorch
    if not isinstance(value, torch.Tensor) or functions.is_functionaltensor(value):
        return value
    return functions._wrap_functional_tensor(value, retrieve_current_functorch_interpreter().level())


def real(value: Any) -> Any:
    """Return, inside `functionalized`, a tensor whose writes stay what they are; anything else as it is."""
    functions: Any = torch._C._functorch
    if not isinstance(value, torch.Tensor) or not functions.is_functionaltensor(value):
        return value
    torch._sync(value)  # type: ignore[attr-defined,no-untyped-call]
    return functions._unwrap_functional_tensor(value, True)


def not_functionalized() -> contextlib.AbstractContextManager[Any]:
    """Inside, operators that are called on `real` tensors within `functionalized` run as they are.

    torch 2.11-2.15: torch/_functorch/pyfunctorch.py.
    """
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    made: contextlib.AbstractContextManager[Any] = retrieve_current_functorch_interpreter().lower()
    return made


def data_dependent_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that torch raises where a trace needs a tensor's values."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode
