"""Which of Dynamo's graphs are not captured: where what a node means depends on more than its arguments.

That is so where a mode is entered and left, where gradients are taken inside, where sizes come from the values of
tensors, or where a tensor carries more than its shape says. Such graphs are left to torch's own compiler, whole.
"""

from __future__ import annotations

from typing import Any

import torch

from piecework.capture.dynamo import example
from piecework.foundation.torch_private import function_module, single_overload

_MODES = frozenset({"_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode"})
_TRANSFORMS = ("torch._functorch.", "torch._C._functorch.", "torch.func.", "torch.autograd.")
_GRADIENTS = frozenset({"backward", "requires_grad_", "retain_grad", "register_hook"})


def why_whole(graph: torch.fx.Graph) -> str | None:
    """Say why a graph of Dynamo's can't be captured, or return None where it may be; Dynamo is compiling it."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            return "autocast is on"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for"
    for node in graph.nodes:
        found = _why(node)
        if found is not None:
            return found
    return None


def _why(node: torch.fx.Node) -> str | None:
    name = str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))
    if node.op == "call_function":
        if name in _MODES:
            return "it enters or leaves a mode"
        if f"{function_module(node.target)}.".startswith(_TRANSFORMS) or name == "autograd_function_apply":
            return "it takes gradients or maps a function over a dimension"
        overload = single_overload(node.target)
        if overload is not None and any(str(r.type) not in _TENSORS for r in overload._schema.returns):
            return f"{overload} returns more than tensors"
    if node.op == "call_method" and name in _GRADIENTS:
        return f"{name} is about gradients"
    return _value(example(node))


_TENSORS = frozenset({"Tensor", "Optional[Tensor]", "List[Tensor]", "Tensor[]"})


def _value(value: Any) -> str | None:
    if isinstance(value, torch.Tensor):
        if type(value).__name__ not in {"FakeTensor", "Parameter", "Tensor"}:
            return f"it has a {type(value).__name__}"
        if value.is_conj() or value.is_neg():
            return "a tensor stands for its conjugate or negative"
        if value.layout is torch.strided and _is_unknown([*value.shape, *value.stride()]):
            return "a size depends on the values of a tensor"
        return None
    if isinstance(value, (tuple, list)):
        return next((why for v in value if (why := _value(v)) is not None), None)
    return "a number depends on the values of a tensor" if _is_unknown([value]) else None


def _is_unknown(sizes: list[Any]) -> bool:
    """Whether a size has a symbol that no input has."""
    return any(
        isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))
        and any(str(symbol).startswith(("u", "zu")) for symbol in size.node.expr.free_symbols)
        for size in sizes
    )
