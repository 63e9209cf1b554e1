"""Cut a captured graph at its opaque ops into pieces, and write each piece down as a program.

A piece is a run of nodes between two opaque ops or ends of declared blocks (capture/blocks.py), or one of the equal
parts of such a run (compiler/repeats.py). Sizes are recomputed inside each piece from one of its own tensors, because
compiled pieces take tensors only. A write to memory that is kept (capture/memory.py) is a step like an opaque op. Views
of such memory belong to no piece: each piece that reads one makes it itself, and for a step that takes one it is a step
before it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch

from piecework.capture.blocks import block_of
from piecework.capture.capture import CapturedGraph, InputKind
from piecework.capture.memory import is_step
from piecework.compiler.encode import ProgramBuilder
from piecework.compiler.repeats import MIN_SAVED, cut_repeats, why_whole
from piecework.foundation.torch_private import TORCHS_NAMESPACES, operator_name
from piecework.ops.ir.program import Program


@dataclass(frozen=True)
class Piece:
    """One piece: its program, and what stands for its inputs, constants, outputs, symbols and calls in the graph."""

    program: Program
    inputs: tuple[torch.fx.Node, ...]
    constants: tuple[str, ...]
    outputs: tuple[torch.fx.Node, ...]
    symbols: Mapping[str, str]
    origins: tuple[torch.fx.Node, ...] = ()


@dataclass(frozen=True)
class OpaqueCall:
    """One call of an opaque op, or of one of torch's operators as a step; its arguments still refer to nodes."""

    node: torch.fx.Node
    results: tuple[torch.fx.Node, ...]

    @property
    def takes_any_strides(self) -> bool:
        """Whether it takes tensors in any layout: a view, or a write to one, is made for the one that was traced."""
        return str(operator_name(self.node.target)).partition("::")[0] not in TORCHS_NAMESPACES


Step = Piece | OpaqueCall


def split(captured: CapturedGraph) -> list[Step]:
    """Return the pieces and opaque calls of one forward, in execution order."""
    opaque = captured.request.opaque
    order: list[list[torch.fx.Node] | torch.fx.Node] = [[]]
    results: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in captured.graph.nodes:
        if node.target is operator.getitem and node.args[0] in results:
            results[node.args[0]].append(node)
        elif node.op == "output" or (node.op == "call_function" and is_step(node, opaque)):
            for view in _views_for(node, captured.views, made=results):
                results[view] = [u for u in view.users if u.target is operator.getitem]
                order.append(view)
            if node.op == "call_function":
                results[node] = []
                order.append(node)
        elif node.op == "call_function" and node not in captured.views and not _is_size(node):
            last = order[-1]
            if isinstance(last, torch.fx.Node) or (last and block_of(last[-1]) is not block_of(node)):
                last = []
                order.append(last)
            last.append(node)
    carriers = _size_carriers(captured)
    weights = {i.node: i.name for i in captured.inputs if i.kind is InputKind.WEIGHT}
    steps: list[Step] = []
    for run in order:
        if isinstance(run, torch.fx.Node):
            steps.append(OpaqueCall(run, tuple(results[run])))
        elif run:
            made = (
                _piece(part, captured=captured, weights=weights, carriers=carriers)
                for part in cut_repeats(run, weights=weights)
            )
            steps += [piece for piece in made if piece is not None]
    return steps


def why_one_piece(path: Sequence[Step], captured: CapturedGraph) -> str | None:
    """Return why a forward of 32 operators or more is one piece, in words; None where it isn't, or has less."""
    nodes = [n for n in captured.graph.nodes if n.op == "call_function" and n not in captured.views and not _is_size(n)]
    if len(path) != 1 or len(nodes) < 2 * MIN_SAVED:
        return None
    weights = {i.node for i in captured.inputs if i.kind is InputKind.WEIGHT}
    return f"the module is one piece of {len(nodes)} operators: {why_whole(nodes, weights=weights)}"


def has_unknown_size(node: torch.fx.Node) -> bool:
    """Whether the size of what a node gives depends on values: torch calls such sizes u0, u1, …"""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and re.search(r"\bu\d+\b", str(list(value.shape))) is not None


def _views_for(
    node: torch.fx.Node, views: Container[torch.fx.Node], *, made: Container[torch.fx.Node]
) -> list[torch.fx.Node]:
    """Return the views among a step's arguments that are not made yet, and what those are views of, in order."""
    found: dict[torch.fx.Node, None] = {}

    def take(source: torch.fx.Node) -> None:
        if source in views and source not in made:
            for argument in source.all_input_nodes:
                take(argument)
            if source.target is not operator.getitem:
                found[source] = None

    for argument in node.all_input_nodes:
        take(argument)
    return list(found)


def _is_size(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _piece(
    nodes: Sequence[torch.fx.Node],
    *,
    captured: CapturedGraph,
    weights: Mapping[torch.fx.Node, str],
    carriers: Mapping[str, torch.fx.Node],
) -> Piece | None:
    own = set(nodes)
    outputs = tuple(n for n in nodes if any(_used_outside(u, own) for u in n.users))
    if not outputs:
        return None
    builder = ProgramBuilder(captured=captured, weights=weights, carriers=carriers)
    for node in nodes:
        builder.call(node)
    program = builder.finish(outputs)
    return Piece(
        program,
        tuple(builder.inputs),
        tuple(weights[n] for n in builder.constants),
        outputs,
        builder.symbols(),
        tuple(builder.origins),
    )


def _used_outside(user: torch.fx.Node, own: set[torch.fx.Node]) -> bool:
    if _is_size(user) and user.op == "call_function":
        return False
    return user not in own


def _size_carriers(captured: CapturedGraph) -> dict[str, torch.fx.Node]:
    """For each symbol, the first argument tensor that has it as a size of its own."""
    found: dict[str, torch.fx.Node] = {}
    for given in captured.inputs:
        value = given.node.meta["val"]
        if given.kind is InputKind.ARGUMENT and isinstance(value, torch.Tensor):
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    found.setdefault(str(size.node.expr), given.node)
    return found
