"""Operators and graphs. torch 2.11-2.13; torch/_ops.py (OpOverload, OpOverloadPacket), torch/fx/graph.py (_root)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch


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


def parameter_position(target: object, name: str) -> int:
    """Return which of an operator's parameters has that name. Raises ValueError where none has."""
    assert isinstance(target, torch._ops.OpOverload)
    return [argument.name for argument in target._schema.arguments].index(name)


def operator_name(target: object) -> str | None:
    """Return "namespace::name" of an operator or of all its overloads (`torch.ops.ns.name`), or None."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name
    found = operator_of(target)
    return None if found is None else found.name


def single_overload(target: object) -> Any:
    """Return the one overload that a node's target calls, or None where it is no registered operator or has several."""
    if isinstance(target, torch._ops.OpOverload):
        return target
    if isinstance(target, torch._ops.OpOverloadPacket):
        names = target.overloads()
        return getattr(target, names[0]) if len(names) == 1 else None
    return None


def function_module(target: Any) -> str:
    """Return the name of the module that a function says it is of; "" where it says none."""
    name = getattr(target, "__qualname__", "")
    module = getattr(target, "__module__", None) or getattr(getattr(target, "__objclass__", None), "__module__", None)
    if not module:  # builtin functions of torch's C modules don't say where they live
        places = {
            "torch": torch,
            "torch._C._nn": torch._C._nn,
            "torch._C": torch._C,
            "torch._C._functorch": torch._C._functorch,
        }
        module = next((text for text, place in places.items() if getattr(place, name, None) is target), "")
    return str(module)


def storage_key(tensor: torch.Tensor) -> int:
    """Return a number that tensors have in common where they share memory (fake ones included)."""
    key: int = tensor.untyped_storage()._cdata
    return key


@dataclass(frozen=True)
class Argument:
    """A parameter of an operator: its declaration without default ("Tensor(a!) cache"), its type, its default."""

    name: str
    text: str
    type: str
    has_default: bool
    default: Any
    is_keyword: bool = False


def operator_arguments(overload: Any) -> tuple[Argument, ...]:
    """Return an operator's parameters in the order of its schema."""
    schema = overload._schema
    texts = _declarations(str(schema))
    return tuple(
        Argument(a.name, text, str(a.type), a.has_default_value(), a.default_value, a.kwarg_only)
        for a, text in zip(schema.arguments, texts, strict=True)
    )


def parse_operator(name: str) -> Any:
    """Return the overload that is written "namespace.name.overload". Raises AttributeError where there is none."""
    namespace, op, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), overload)


def _declarations(schema: str) -> list[str]:
    """Return the parameters of a schema's text, each without its default; the "*" is left out."""
    inside = schema.partition("(")[2].rpartition(" -> ")[0].rstrip()[:-1]
    parts, depth, quote = [""], 0, ""
    for character in inside:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(character, 0) if not quote else 0
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [p.strip().partition("=")[0] for p in parts if p.strip() not in {"", "*"}]


def last_node(graph: torch.fx.Graph) -> torch.fx.Node:
    """Return the node that was put into `graph` last, or its root where it has none yet."""
    return graph._root.prev


def nodes_after(graph: torch.fx.Graph, node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Yield the nodes that follow `node` (a node of `graph`, or what `last_node` gave for an empty graph)."""
    following = node.next
    while following is not graph._root:
        yield following
        following = following.next


TORCHS_NAMESPACES: Final = frozenset(
    {
        "_c10d_functional",
        "_c10d_functional_autograd",
        "_dtensor",
        "_inductor_test",
        "_native",
        "_quantized",
        "_test",
        "aten",
        "c10d",
        "c10d_functional",
        "debug_mode_ops",
        "coor",
        "debugprims",
        "export",
        "flex_lib",
        "fsdp",
        "higher_order",
        "inductor",
        "inductor_prims",
        "mempool",
        "mkl",
        "mkldnn",
        "mkldnn_prepacked",
        "nnapi",
        "nvprims",
        "onednn",
        "onnx",
        "onnx_symbolic",
        "prepacked",
        "prim",
        "prims",
        "profiler",
        "quantization",
        "quantized",
        "quantized_decomposed",
        "rngprims",
        "rpc",
        "sparse",
        "static_runtime",
        "streams",
        "symm_mem",
        "tensorexpr",
        "torch_attn",
    }
)
"""Namespaces in which torch itself registers operators."""

_OUTSIDE: Final = frozenset(
    {"_print", "_resize_output_", "data", "from_file", "record_stream", "resize_", "resize_as_", "set_", "set_data"}
)


def is_computation(name: str) -> bool:
    """Whether an operator of torch's, "name" or "name.overload", leaves files and tensors' memory as they are."""
    return name.partition(".")[0] not in _OUTSIDE


def call_arguments(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operator's call by name, defaults included."""
    given = {a.name: value for a, value in zip(target._schema.arguments, args, strict=False)} | dict(kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in target._schema.arguments}


def arguments_of_call(target: Any, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return `args` and `kwargs` of a node that calls an operator, as a trace would write them: without defaults."""

    def left_out(argument: Any) -> bool:
        value, default = named[argument.name], argument.default_value
        return bool(argument.has_default_value() and type(value) is type(default) and value == default)

    schema = target._schema.arguments
    positional = [a for a in schema if not a.kwarg_only]
    while positional and left_out(positional[-1]):
        positional.pop()
    kwargs = {a.name: named[a.name] for a in schema if a.kwarg_only and not left_out(a)}
    return tuple(named[a.name] for a in positional), kwargs
