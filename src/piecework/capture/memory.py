"""Which values of a graph lie in the same memory, and which operators write to it.

A captured graph is functional as far as compiled pieces see it. What is written to all the same is memory that outlives
the forward (an input) or that an opaque op writes to: such a write is a step of its own, in its place in the order, on
the real tensor; and views of that memory are made anew for each piece and each step that reads them, so that all see
what was written. What only torch's own operators write to, and what the forward itself has made, is functionalized
(capture.py), and costs nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch

from piecework.capture.cuts import is_opaque
from piecework.errors import CaptureError


def bases_of(graph: torch.fx.Graph) -> dict[torch.fx.Node, torch.fx.Node]:
    """Return for each node the one that made the memory in which its value lies: itself, or what it is a view of."""
    found: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph.nodes:
        if node.target is operator.getitem:  # one of several results: parts of one tensor, or tensors of their own
            (several, _) = node.args
            found[node] = node if found[several] is several else found[several]
        else:
            source = _source(node)
            found[node] = node if source is None else found[source]
    return found


def written_by(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the tensors among a node's arguments that its operator may write to."""
    return [n for argument, n in _tensor_arguments(node) if argument.alias_info and argument.alias_info.is_write]


def kept_memory(graph: torch.fx.Graph, *, opaque: frozenset[str]) -> frozenset[torch.fx.Node]:
    """Return the memory, by the node that made it, to which the graph really writes: no copy may take its place."""
    bases = bases_of(graph)
    kept = set()
    for node in graph.nodes:
        for tensor in written_by(node):
            if is_opaque(node, opaque) or bases[tensor].op == "placeholder":
                kept.add(bases[tensor])
    return frozenset(kept)


def is_step(node: torch.fx.Node, opaque: frozenset[str]) -> bool:
    """Whether a node of a captured graph is a step of its own: an opaque op, or a write to memory that is kept."""
    return is_opaque(node, opaque) or bool(written_by(node))


def changed_inputs(graph: torch.fx.Graph, *, opaque: frozenset[str]) -> list[torch.fx.Node]:
    """Return the inputs to which torch's own operators write."""
    bases = bases_of(graph)
    written = [bases[w] for n in graph.nodes if not is_opaque(n, opaque) for w in written_by(n)]
    return [base for base in dict.fromkeys(written) if base.op == "placeholder"]


def views_of(graph: torch.fx.Graph, *, opaque: frozenset[str]) -> frozenset[torch.fx.Node]:
    """Return the nodes that are views of memory to which the graph really writes."""
    kept = kept_memory(graph, opaque=opaque)
    bases = bases_of(graph)
    return frozenset(n for n, base in bases.items() if base in kept and n is not base and not is_step(n, opaque))


def forget_results_of_writes(graph: torch.fx.Graph) -> None:
    """Read what an operator such as `add_` returns from the tensor that it writes to.

    Raises CaptureError where that changes its shape as well.
    """
    for node in graph.nodes:
        source = _source(node) if written_by(node) else None
        if source is None or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if node.meta["val"].shape != source.meta["val"].shape:
            raise CaptureError(
                asked="a tensor that outlives the call, or that an opaque op writes to, in the shape that it has",
                found=f"{node.target} changes its shape in place",
                try_="use the operator that returns a view instead",
            )
        node.replace_all_uses_with(source)


def _source(node: torch.fx.Node) -> torch.fx.Node | None:
    """Return the argument in whose memory a node's result lies, or None where that is new."""
    arguments = [(a.alias_info, n) for a, n in _tensor_arguments(node) if a.alias_info is not None]
    if not arguments:
        return None
    if not any(alias.is_write for alias, _ in arguments):
        return arguments[0][1]
    returned = [r.alias_info.before_set for r in node.target._schema.returns if r.alias_info is not None]  # type: ignore[union-attr]
    return next((n for alias, n in arguments if alias.before_set in returned), None)


def _tensor_arguments(node: torch.fx.Node) -> Iterator[tuple[torch.Argument, torch.fx.Node]]:
    """Yield the arguments of an operator that are tensors, each with what its schema says of it."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    for argument in schema:
        value = given.get(argument.name)
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, torch.fx.Node) and isinstance(part.meta.get("val"), torch.Tensor):
                yield argument, part
