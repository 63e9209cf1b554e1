"""Cut a graph that Dynamo captured at its opaque operators.

A Dynamo graph holds torch functions as the model's code calls them, in-place ones included, and runs in order; so do
its pieces. What is between two cuts is a piece. Sizes are not passed from piece to piece: they are the graph's own
inputs (Dynamo makes one for each symbol), or computed from those where they are used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from piecework.foundation.torch_private import function_name

_SHAPE_QUERIES = frozenset({"size", "stride", "numel", "nelement", "dim", "ndimension", "storage_offset", "__len__"})


@dataclass(frozen=True)
class GraphPiece:
    """A run of nodes between two cuts, with the nodes it takes from outside and those that are used after it."""

    nodes: tuple[torch.fx.Node, ...]
    inputs: tuple[torch.fx.Node, ...]
    outputs: tuple[torch.fx.Node, ...]


@dataclass(frozen=True)
class GraphCall:
    """One call outside of the pieces: of an opaque operator, or one that computes a size for such a call.

    `items` are the parts of its result that are used, with their index.
    """

    node: torch.fx.Node
    items: tuple[tuple[int, torch.fx.Node], ...]


GraphStep = GraphPiece | GraphCall


def example(node: torch.fx.Node) -> Any:
    """Return the fake value that Dynamo noted for a node, or None."""
    return node.meta.get("example_value")


def split_graph(graph: torch.fx.Graph, *, is_cut: Callable[[torch.fx.Node], bool]) -> list[GraphStep]:
    """Return the pieces and opaque calls of a Dynamo graph in execution order.

    The graph is changed: sizes that equal one of its inputs become that input, and switches of the grad mode go.
    `dynamo_whole.why_whole` says which graphs must not be cut.
    """
    _drop_grad_switches(graph)
    sizes = _unify_sizes(graph)
    body = [n for n in graph.nodes if n.op in {"call_function", "call_method", "call_module"}]
    cuts = frozenset(n for n in body if is_cut(n))
    parts: list[list[torch.fx.Node] | torch.fx.Node] = []
    computed: set[torch.fx.Node] = set()
    for node in body:
        if node in cuts:
            parts += [*_sizes_for(node.all_input_nodes, computed), node]
        elif _is_item(node, cuts) or _is_size(node):
            continue
        elif parts and isinstance(parts[-1], list):
            parts[-1].append(node)
        else:
            parts.append([node])
    returned = [n for n in output_nodes(graph) if isinstance(n, torch.fx.Node)]
    parts += _sizes_for(returned, computed)
    members = [None if isinstance(p, torch.fx.Node) else _members(p, sizes=sizes) for p in parts]
    needed = set(returned)
    for part, found in zip(parts, members, strict=True):
        needed.update(part.all_input_nodes if isinstance(part, torch.fx.Node) else found.inputs)  # type: ignore[union-attr]
    steps: list[GraphStep] = []
    for part, found in zip(parts, members, strict=True):
        if isinstance(part, torch.fx.Node):
            steps.append(_call(part, is_cut=part in cuts))
        elif found is not None:
            steps.append(GraphPiece(found.nodes, found.inputs, tuple(n for n in part if n in needed)))
    return steps


def _call(node: torch.fx.Node, *, is_cut: bool) -> GraphCall:
    items = [u for u in node.users if is_cut and _is_item(u, frozenset({node}))]
    return GraphCall(node, tuple((int(u.args[1]), u) for u in items))  # type: ignore[arg-type]


def _sizes_for(nodes: Iterable[torch.fx.Node], computed: set[torch.fx.Node]) -> list[torch.fx.Node]:
    """Return the size computations that `nodes` need and that are not in `computed` yet, in order; adds them there."""
    found: list[torch.fx.Node] = []
    for node in nodes:
        if _is_size(node) and node.op != "placeholder" and node not in computed:
            found += [*_sizes_for(node.all_input_nodes, computed), node]
            computed.add(node)
    return found


def _members(own: Sequence[torch.fx.Node], *, sizes: Mapping[str, torch.fx.Node]) -> GraphPiece:
    """Return the piece of `own`, with the nodes that compute sizes for it; its outputs are not known yet."""
    members: dict[torch.fx.Node, None] = {}
    inputs: dict[torch.fx.Node, None] = {}
    inside = set(own)

    def take(node: torch.fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in inside or source in members:
                continue
            if _is_size(source) and source.op != "placeholder":
                take(source)
            elif source.op == "get_attr" and not isinstance(example(source), torch.Tensor):
                members[source] = None  # the body of a higher-order operator
            else:
                inputs[source] = None
        members[node] = None

    for node in own:
        take(node)
    # code is generated from sizes that some input has by itself; "s0*s1" alone doesn't tell s0
    missing = _symbols_in(inputs) - {str(d.node.expr) for d in _dims(inputs)}
    inputs.update(dict.fromkeys(sizes[name] for name in sorted(missing) if name in sizes))
    return GraphPiece(tuple(members), tuple(inputs), ())


def _dims(nodes: Iterable[torch.fx.Node]) -> Iterator[torch.SymInt]:
    for value in map(example, nodes):
        dims = [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]
        yield from (d for d in dims if isinstance(d, torch.SymInt))


def _symbols_in(nodes: Iterable[torch.fx.Node]) -> set[str]:
    return {str(symbol) for dim in _dims(nodes) for symbol in dim.node.expr.free_symbols}


def _is_item(node: torch.fx.Node, cuts: frozenset[torch.fx.Node]) -> bool:
    """Whether a node picks one of several results of an opaque operator."""
    if node.target is not operator.getitem or node.args[0] not in cuts:
        return False
    return isinstance(example(node.args[0]), (tuple, list)) and isinstance(node.args[1], int)  # type: ignore[arg-type]


def _is_size(node: torch.fx.Node) -> bool:
    """Whether a node computes sizes only, from shapes and other sizes: it may be done elsewhere, or more than once."""
    if not _only_sizes(example(node)):
        return False
    if node.op == "placeholder":
        return True
    asks_tensors = any(isinstance(example(n), torch.Tensor) for n in node.all_input_nodes)
    if node.op == "call_method":
        return str(node.target) in _SHAPE_QUERIES or not asks_tensors
    name = function_name(node.target) or ""
    if asks_tensors:
        return name == "builtins.getattr" or name.startswith(("aten.sym_", "builtins.len"))
    return name.split(".")[0] in {"_operator", "operator", "math", "builtins"} or name.startswith("torch.sym_")


def _only_sizes(value: Any) -> bool:
    if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
        return True
    return isinstance(value, (torch.Size, tuple, list)) and bool(value) and all(_is_number(v) for v in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt))


def _unify_sizes(graph: torch.fx.Graph) -> Mapping[str, torch.fx.Node]:
    """Use the graph's inputs for the sizes that equal them; returns those inputs by symbol."""
    inputs = {
        str(example(n).node.expr): n
        for n in graph.nodes
        if n.op == "placeholder" and isinstance(example(n), torch.SymInt)
    }
    for node in list(graph.nodes):
        value = example(node)
        if node.op == "placeholder" or not isinstance(value, torch.SymInt):
            continue
        known = inputs.get(str(value.node.expr))
        if known is not None:
            node.replace_all_uses_with(known)
            graph.erase_node(node)
    return inputs


def _drop_grad_switches(graph: torch.fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "_set_grad_enabled":
            graph.erase_node(node)


def output_nodes(graph: torch.fx.Graph) -> tuple[Any, ...]:
    """Return what a Dynamo graph returns: nodes, or constants."""
    (output,) = (n for n in graph.nodes if n.op == "output")
    values = output.args[0]
    return tuple(values) if isinstance(values, Iterable) else (values,)
