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

_CONTEXTS = ("_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode")


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
    A graph that switches autocast on or off stays whole, because a cut could end up inside.
    """
    _drop_grad_switches(graph)
    sizes = _unify_sizes(graph)
    body = [n for n in graph.nodes if n.op in {"call_function", "call_method", "call_module"}]
    whole = any(getattr(n.target, "__name__", "") in _CONTEXTS for n in body)
    cuts = frozenset() if whole else frozenset(n for n in body if is_cut(n))
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
    items = [u for u in node.users if is_cut and u.target is operator.getitem]
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
    return node.target is operator.getitem and node.args[0] in cuts


def _is_size(node: torch.fx.Node) -> bool:
    """Whether a node computes sizes only."""
    return _only_sizes(example(node))


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
