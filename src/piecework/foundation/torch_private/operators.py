"""Operators and graphs. torch 2.11-2.13; torch/_ops.py (OpOverload, OpOverloadPacket), torch/fx/graph.py (_root)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
