"""From the steps of a captured graph to the plan of a bundle: unique pieces, instances, recipes, slots."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from piecework.errors import CaptureError, InternalError
from piecework.foundation.torch_private import operator_of
from piecework.graph.capture import CapturedGraph, InputKind
from piecework.graph.encode import encode_torch_type
from piecework.graph.request import TensorInput
from piecework.graph.split import OpaqueCall, Piece, Step
from piecework.ops.layer import LayerName
from piecework.ops.program import Program, encode_float
from piecework.ops.weight_source import Concat, Source, Take, label
from piecework.passes.merge_linear import Merged, merge_linear, unmerged
from piecework.passes.pack_linear import PACKING, packable_constants
from piecework.store.plan import (
    Instance,
    OpStep,
    PieceStep,
    Plan,
    PlanInput,
    Recipe,
    ShapeRange,
    State,
    UniquePiece,
    size_expression,
)


@dataclass(frozen=True)
class Unique:
    """A structurally different piece.

    Attributes:
        captured: the piece as it was captured.
        lowered: the piece after passes, which is what a backend compiles.
        primary: the program's symbol for the primary size, or None where the piece doesn't have it.
        pack: constants of the lowered program that are bound packed.
        uses: how many pieces are equal to it.
    """

    captured: Program
    lowered: Merged
    primary: str | None
    pack: frozenset[int]
    uses: int

    @property
    def program(self) -> Program:
        """The program that a backend compiles."""
        return self.lowered.program


@dataclass(frozen=True)
class Deduplicated:
    """The unique pieces of a model, and which of them each piece is (in step order)."""

    unique: tuple[Unique, ...]
    index_of: Mapping[int, int]


def deduplicate(steps: Sequence[Step], *, primary: str, merge: bool, pack_dtypes: frozenset[str]) -> Deduplicated:
    """Group pieces by fingerprint, and lower each unique one.

    Args:
        steps: from `graph.split`.
        primary: the graph's symbol for the primary size, "" where no ranges of it are told apart. Pieces that have it
            in another place are different: an artifact for a part of its range must not serve another size.
        merge: whether linear layers are merged (passes/merge_linear.py).
        pack_dtypes: dtypes of weights that are packed (passes/pack_linear.py).
    """
    order: dict[tuple[str, str | None], int] = {}
    programs: list[Piece] = []
    opaque = {step.node for step in steps if isinstance(step, OpaqueCall)}
    uses: list[int] = []
    strict: list[set[int]] = []
    index_of: dict[int, int] = {}
    for number, step in enumerate(steps):
        if not isinstance(step, Piece):
            continue
        structure = step.program.fingerprint(), step.symbols.get(primary)
        if structure not in order:
            order[structure] = len(programs)
            programs.append(step)
            uses.append(0)
            strict.append(set())
        index_of[number] = order[structure]
        uses[order[structure]] += 1
        strict[order[structure]].update(i for i, node in enumerate(step.outputs) if not opaque.issuperset(node.users))
    unique = []
    for piece, count, positions in zip(programs, uses, strict, strict=True):
        lowered = merge_linear(piece.program, strict_outputs=frozenset(positions)) if merge else unmerged(piece.program)
        pack = packable_constants(lowered.program, dtypes=pack_dtypes)
        unique.append(Unique(piece.program, lowered, piece.symbols.get(primary), pack, count))
    return Deduplicated(tuple(unique), index_of)


def make_plan(
    captured: CapturedGraph,
    steps: Sequence[Step],
    pieces: Deduplicated,
    *,
    artifacts: Sequence[Sequence[ShapeRange]],
    arguments: Any = None,
) -> Plan:
    """Return the plan; `artifacts[i]` are the compiled forms of unique piece i."""
    return _Planner(captured, steps, pieces).plan(artifacts, arguments=arguments)


@dataclass(frozen=True)
class _Wanted:
    """A constant that a step needs: of which parameters it is made, and how it is packed."""

    names: tuple[str, ...]
    pack: str

    def family(self) -> tuple[str, str, int, int]:
        """Return what sorts a kind's constants of successive layers next to each other."""
        parts = self.names[0].split(".")
        number = next((i for i, p in enumerate(parts) if p.isdigit()), None)
        if number is None:
            return self.names[0], self.pack, len(self.names), 0
        pattern = ".".join([*parts[:number], "#", *parts[number + 1 :]])
        return pattern, self.pack, len(self.names), int(parts[number])


class _Planner:
    def __init__(self, captured: CapturedGraph, steps: Sequence[Step], pieces: Deduplicated) -> None:
        self._captured = captured
        self._steps = steps
        self._pieces = pieces
        request = captured.request
        self._arguments = [i for i in captured.inputs if i.kind is InputKind.ARGUMENT]
        self._weights = {i.node: i.name for i in captured.inputs if i.kind is InputKind.WEIGHT}
        self._weight_nodes = {i.name: i.node for i in captured.inputs if i.kind is InputKind.WEIGHT}
        self._states = {i.node: i.name for i in captured.inputs if i.kind is InputKind.STATE}
        self._state_order = [n for n in request.states if n in set(self._states.values())]
        self._slots: dict[torch.fx.Node, int] = {i.node: n for n, i in enumerate(self._arguments)}
        self._free: list[int] = []
        self._num_slots = len(self._arguments)
        self._ending = self._last_uses()
        self._recipes: dict[_Wanted, int] = {}
        self._recipe_list: list[Recipe] = []

    def plan(self, artifacts: Sequence[Sequence[ShapeRange]], *, arguments: Any) -> Plan:
        request = self._captured.request
        wanted = self._order_recipes()
        instances: list[Instance] = []
        out: list[PieceStep | OpStep] = []
        for number, step in enumerate(self._steps):
            if isinstance(step, Piece):
                unique = self._pieces.index_of[number]
                instances.append(Instance(unique, tuple(wanted[number])))
                inputs = tuple(self._slot(n) for n in step.inputs)
                self._release(number)
                outputs = tuple(self._define(n) for n in step.outputs)
                out.append(PieceStep(len(instances) - 1, inputs, outputs))
            else:
                out.append(self._op_step(number, step))
        results = self._results()
        return Plan(
            sizes={n: (d.min, d.max) for n, d in request.sizes.items()},
            primary=next(iter(request.sizes), ""),
            inputs=tuple(self._plan_input(i.name) for i in self._arguments),
            states=tuple(self._state(n) for n in self._state_order),
            recipes=tuple(self._recipe_list),
            pieces=tuple(self._unique(i, artifacts[i]) for i in range(len(self._pieces.unique))),
            instances=tuple(instances),
            steps=tuple(out),
            num_slots=self._num_slots,
            output_slots=results,
            structure=self._captured.structure,
            arguments=arguments,
        )

    def _order_recipes(self) -> dict[int, list[int]]:
        """Number the recipes so that one kind's in successive layers are neighbours: the plan writes them once."""
        needs: list[tuple[int, _Wanted]] = []
        for number, step in enumerate(self._steps):
            if isinstance(step, Piece):
                unique = self._pieces.unique[self._pieces.index_of[number]]
                for i, made_of in enumerate(unique.lowered.constants):
                    names = tuple(step.constants[old] for old in made_of)
                    needs.append((number, _Wanted(names, PACKING if i in unique.pack else "")))
            else:
                weights = [self._weights[n] for n in _nodes_in(step.node) if n in self._weights]
                needs += [(number, _Wanted((name,), "")) for name in weights]
        for item in sorted({item for _, item in needs}, key=_Wanted.family):
            self._recipes[item] = len(self._recipe_list)
            self._recipe_list.append(self._recipe(item))
        wanted: dict[int, list[int]] = {}
        for number, item in needs:
            wanted.setdefault(number, []).append(self._recipes[item])
        return {n: wanted.get(n, []) for n in range(len(self._steps))}

    def _recipe(self, wanted: _Wanted) -> Recipe:
        value = self._weight_nodes[wanted.names[0]].meta["val"]
        dtype = str(value.dtype).removeprefix("torch.")
        sources = tuple(self._source(name) for name in wanted.names)
        source = sources[0] if len(sources) == 1 else Concat(sources)
        literal = wanted.names[0] in self._captured.literals
        if isinstance(source, Take):
            return Recipe(source.name, source.shape, dtype, literal, wanted.pack)
        return Recipe(label(source), source.shape, dtype, pack=wanted.pack, source=source)

    def _source(self, name: str) -> Source:
        shape = tuple(int(d) for d in self._weight_nodes[name].meta["val"].shape)
        source = self._captured.request.sources.get(name, Take(name, shape))
        if source.shape != shape:
            raise InternalError(f"{name} of shape {shape} has a source of shape {source.shape}")
        return source

    def _unique(self, index: int, ranges: Sequence[ShapeRange]) -> UniquePiece:
        unique = self._pieces.unique[index]
        program = unique.captured
        specs = (*program.inputs, *program.constants)
        made_of = unique.lowered.constants
        return UniquePiece(
            fingerprint=program.fingerprint(),
            ranges=tuple(ranges),
            num_ops=len(program.calls),
            num_constants=len(program.constants),
            device=specs[0].device if specs else "cpu",
            merged=made_of if any(len(constants) > 1 for constants in made_of) else (),
        )

    def _op_step(self, number: int, step: OpaqueCall) -> OpStep:
        operator = operator_of(step.node.target)
        assert operator is not None
        args = tuple(self._op_argument(a) for a in step.node.args)
        kwargs = {k: self._op_argument(v) for k, v in step.node.kwargs.items()}
        self._release(number)
        value = step.node.meta.get("val")
        outputs: tuple[int, ...]
        if isinstance(value, torch.Tensor):
            outputs = (self._define(step.node),)
        elif isinstance(value, (tuple, list)):
            by_index = {n.args[1]: n for n in step.results}
            outputs = tuple(self._define(by_index[i]) if i in by_index else -1 for i in range(len(value)))
        else:
            outputs = ()
        return OpStep(f"{operator.name}.{operator.overload}", args, kwargs, outputs)

    def _op_argument(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            if value in self._states:
                return {"state": self._state_order.index(self._states[value])}
            if value in self._weights:
                return {"recipe": self._recipes[_Wanted((self._weights[value],), "")]}
            size = value.meta.get("val")
            if isinstance(size, torch.SymInt):
                return {"size": self._named_sizes(str(size.node.expr))}
            return {"slot": self._slot(value)}
        if isinstance(value, (list, tuple)):
            return {"list": [self._op_argument(v) for v in value]}
        if isinstance(value, LayerName):
            return {"layer": value.value}
        if value is None or isinstance(value, (bool, int, str)):
            return {"const": value}
        if isinstance(value, float):
            encoded = encode_float(value)
            return {"const": value} if encoded == value else encoded
        encoded = encode_torch_type(value)
        if encoded is not None:
            return encoded
        raise CaptureError(
            asked="opaque ops whose arguments are tensors, numbers, strings, layers' names and torch's own types",
            found=f"an argument of type {type(value).__name__}",
            try_="pass it as a string or number, or resolve it inside the op",
        )

    def _named_sizes(self, expression: str) -> str:
        named = re.sub(r"[A-Za-z_]\w*", lambda m: self._captured.size_names.get(m.group(0), m.group(0)), expression)
        try:
            size_expression(named)
        except ValueError:
            raise CaptureError(
                asked="opaque ops whose sizes are sums, products and quotients of the declared sizes",
                found=f"the size {named}",
                try_="compute it inside the op",
            ) from None
        return named

    def _slot(self, node: torch.fx.Node) -> int:
        if node in self._slots:
            return self._slots[node]
        if node in self._states:
            raise CaptureError(
                asked="states that only opaque ops touch",
                found=f"a piece reads the state {self._states[node]}",
                try_="read and write it inside an opaque op",
            )
        raise InternalError(f"{node} is used before it is computed")

    def _define(self, node: torch.fx.Node) -> int:
        slot = self._free.pop() if self._free else self._num_slots
        if slot == self._num_slots:
            self._num_slots += 1
        self._slots[node] = slot
        return slot

    def _release(self, number: int) -> None:
        """Give back the slots of values whose last use is step `number`; its outputs may take them at once."""
        for node in self._ending.get(number, ()):
            if node in self._slots and self._slots[node] >= len(self._arguments):
                self._free.append(self._slots[node])

    def _last_uses(self) -> dict[int, list[torch.fx.Node]]:
        """Return, for each step, the values that are used for the last time there."""
        last: dict[torch.fx.Node, int] = {}
        for number, step in enumerate(self._steps):
            used = step.inputs if isinstance(step, Piece) else _nodes_in(step.node)
            for node in used:
                last[node] = number
        for node in self._output_nodes():
            last[node] = len(self._steps)
        ending: dict[int, list[torch.fx.Node]] = {}
        for node, number in last.items():
            ending.setdefault(number, []).append(node)
        return ending

    def _output_nodes(self) -> list[torch.fx.Node]:
        output = next(n for n in self._captured.graph.nodes if n.op == "output")
        nodes: list[torch.fx.Node] = []
        torch.fx.map_arg(output.args[0], nodes.append)
        return nodes

    def _results(self) -> tuple[int, ...]:
        for node in self._output_nodes():
            if node in self._weights or node in self._states:
                raise CaptureError(
                    asked="a module whose results are computed from its inputs",
                    found=f"it returns its own {self._weights.get(node) or self._states.get(node)}",
                    try_="read that tensor from the module instead",
                )
        return tuple(self._slot(n) for n in self._output_nodes())

    def _plan_input(self, name: str) -> PlanInput:
        given = next(i for i in self._captured.request.inputs if i.name == name)
        if isinstance(given, TensorInput):
            fake = next(i.node.meta["val"] for i in self._arguments if i.name == name)
            stride = given.stride if given.stride is not None and not fake.is_contiguous() else None
            return PlanInput(name=name, shape=given.shape, dtype=given.dtype, device=given.device, stride=stride)
        return PlanInput(name=name, size=given.size)

    def _state(self, name: str) -> State:
        given = self._captured.request.states[name]
        return State(name=name, shape=given.shape, dtype=given.dtype, device=self._captured.request.device)


def _nodes_in(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the nodes among a call's arguments, in order, each as often as it occurs."""
    found: list[torch.fx.Node] = []
    torch.fx.map_arg((node.args, node.kwargs), found.append)
    return found
