"""Cut a captured graph at its opaque ops into pieces, and write each piece down as a program.

A piece is a maximal run of nodes between two opaque ops. Sizes are recomputed inside each piece from one of its own
tensors, because compiled pieces take tensors only.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from piecework.capture.capture import CapturedGraph, InputKind
from piecework.capture.cuts import is_opaque
from piecework.compiler.encode import ProgramBuilder
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
    """One call of an opaque op; its arguments still refer to nodes."""

    node: torch.fx.Node
    results: tuple[torch.fx.Node, ...]


Step = Piece | OpaqueCall


def split(captured: CapturedGraph) -> list[Step]:
    """Return the pieces and opaque calls of one forward, in execution order."""
    opaque = captured.request.opaque
    groups: list[list[torch.fx.Node]] = [[]]
    order: list[list[torch.fx.Node] | torch.fx.Node] = [groups[0]]
    results: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in captured.graph.nodes:
        if node.op != "call_function" or isinstance(node.meta.get("val"), torch.SymInt):
            continue
        if is_opaque(node, opaque):
            results[node] = []
            groups.append([])
            order += [node, groups[-1]]
        elif node.target is operator.getitem and node.args[0] in results:
            results[node.args[0]].append(node)
        else:
            groups[-1].append(node)
    carriers = _size_carriers(captured)
    steps: list[Step] = []
    for part in order:
        if isinstance(part, torch.fx.Node):
            steps.append(OpaqueCall(part, tuple(results[part])))
        elif part:
            piece = _piece(part, captured=captured, carriers=carriers)
            if piece is not None:
                steps.append(piece)
    return steps


def _piece(
    nodes: list[torch.fx.Node], *, captured: CapturedGraph, carriers: Mapping[str, torch.fx.Node]
) -> Piece | None:
    own = set(nodes)
    weights = {i.node: i.name for i in captured.inputs if i.kind is InputKind.WEIGHT}
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
    if isinstance(user.meta.get("val"), torch.SymInt) and user.op == "call_function":
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
