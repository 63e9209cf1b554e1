"""From a model's forwards in steps to the plan of its bundle: instances, recipes, slots."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from piecework.bundle.packings import LINEAR_COLUMNS
from piecework.bundle.plan import (
    Instance,
    OpStep,
    PieceStep,
    Plan,
    PlanInput,
    PlanVariant,
    Recipe,
    ShapeRange,
    State,
    UniquePiece,
)
from piecework.bundle.recipes import Concat, Source, Take, label
from piecework.bundle.sizes import names_in, size_expression
from piecework.bundle.where import Where
from piecework.capture.capture import CapturedGraph, InputKind
from piecework.capture.memory import kept_memory
from piecework.capture.request import CaptureRequest, SizeInput, TensorInput
from piecework.capture.structure import Structure, changed
from piecework.compiler.deduplicate import Deduplicated, Forward, Unique
from piecework.compiler.encode import encode_torch_type
from piecework.compiler.packing import packable_argument
from piecework.compiler.split import OpaqueCall, Piece
from piecework.errors import CaptureError, InternalError
from piecework.foundation.torch_private import operator_of
from piecework.ops.ir.layer import LayerName
from piecework.ops.ir.program import encode_float


def make_plan(
    paths: Sequence[Forward],
    pieces: Deduplicated,
    *,
    artifacts: Sequence[Sequence[ShapeRange]],
    arguments: Any = None,
) -> Plan:
    """Return the plan of a model's forwards, of which the last is no variant.

    Args:
        paths: the forwards.
        pieces: their unique pieces.
        artifacts: `artifacts[i]` are the compiled forms of unique piece i.
        arguments: see Plan.
    """
    _require_one_structure(paths)
    constants = _Constants(paths, pieces)
    instances: list[Instance] = []
    planned = [
        _Planner(path, number, pieces, constants=constants, instances=instances).steps()
        for number, path in enumerate(paths)
    ]
    captured = paths[-1].captured
    request = captured.request
    *variants, rest = planned
    return Plan(
        sizes={n: (d.min, d.max) for n, d in request.sizes.items()},
        primary=next(iter(request.sizes), ""),
        inputs=_plan_inputs(captured, constants),
        states=tuple(_state(request, name) for name in constants.states),
        recipes=tuple(constants.recipes),
        pieces=tuple(_unique_piece(piece, ranges) for piece, ranges in zip(pieces.unique, artifacts, strict=True)),
        instances=tuple(instances),
        steps=rest.steps,
        num_slots=rest.num_slots,
        output_slots=rest.output_slots,
        structure=captured.structure,
        arguments=arguments,
        variants=tuple(variants),
    )


def _require_one_structure(paths: Sequence[Forward]) -> None:
    """Raise CaptureError where the results of some batches are made up otherwise than those of the others."""
    *variants, rest = paths
    for path in variants:
        where = Where() if path.variant is None else path.variant.where
        fixed = {name: low for name, low, high in where.within if low == high}
        ends = partial(_at, sizes=fixed)
        if changed(path.captured.structure, ends) != changed(rest.captured.structure, ends):
            raise CaptureError(
                asked="a module whose results are made up the same way for all sizes",
                found=f"where {where.text()}, it returns something else",
                try_="return as many tensors, and the same numbers, for all sizes",
            )


def _at(end: Structure, *, sizes: Mapping[str, int]) -> Structure:
    """Return an end of a structure where some sizes have values."""
    if "size" not in end or not names_in(end["size"]) <= sizes.keys():
        return end
    return {"const": size_expression(end["size"])(sizes)}


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


class _Constants:
    """The constants and states that the steps of all forwards need.

    Attributes:
        recipes: the constants, numbered so that one kind's in successive layers are neighbours: the plan writes them
            once.
        states: the states' names, in the order in which they are declared.
    """

    def __init__(self, paths: Sequence[Forward], pieces: Deduplicated) -> None:
        self._pieces = pieces
        self._needs: dict[tuple[int, int], list[_Wanted]] = {}
        opaque: list[tuple[tuple[int, int], OpaqueCall, Mapping[torch.fx.Node, str]]] = []
        for path_number, path in enumerate(paths):
            weights = {i.node: i.name for i in path.captured.inputs if i.kind is InputKind.WEIGHT}
            for number, step in enumerate(path.steps):
                place = path_number, number
                if isinstance(step, Piece):
                    self._needs[place] = self._of_piece(step, self._pieces.unique[self._pieces.index_of[place]])
                else:
                    opaque.append((place, step, weights))
        self._packed = {item for items in self._needs.values() for item in items if item.pack == LINEAR_COLUMNS}
        for place, step, known in opaque:
            packable = packable_argument(step.node)
            self._needs[place] = [
                self._given(known[n], packable=packable is not None and n is packable.weight)
                for n in _nodes_in(step.node)
                if n in known
            ]
        nodes = [(i, path) for path in paths for i in path.captured.inputs]
        kinds = (InputKind.WEIGHT, InputKind.HELD)
        self._weights = {i.name: (i.node, path) for i, path in nodes if i.kind in kinds}
        self._needs[-1, -1] = [_Wanted((name,), "") for name in paths[-1].captured.request.held or ()]
        used = {i.name for i, _ in nodes if i.kind is InputKind.STATE}
        self.states = [name for name in paths[-1].captured.request.states if name in used]
        wanted = sorted({item for items in self._needs.values() for item in items}, key=_Wanted.family)
        self._numbers = {item: number for number, item in enumerate(wanted)}
        self.recipes = [self._recipe(item) for item in wanted]

    def of_step(self, path: int, number: int) -> tuple[int, ...]:
        """Return the recipes that a step needs."""
        return tuple(self._numbers[item] for item in self._needs[path, number])

    def of_held(self, name: str) -> int:
        """Return the recipe of a held buffer."""
        return self._numbers[_Wanted((name,), "")]

    def of_parameter(self, name: str, *, packable: bool) -> tuple[int, bool]:
        """Return the recipe of a parameter that an opaque op takes, and whether it is packed."""
        given = self._given(name, packable=packable)
        return self._numbers[given], bool(given.pack)

    def _given(self, name: str, *, packable: bool) -> _Wanted:
        """Return what an opaque op is given: where it can, what pieces read anyway, so that it is in memory once."""
        packed = _Wanted((name,), LINEAR_COLUMNS)
        return packed if packable and packed in self._packed else _Wanted((name,), "")

    @staticmethod
    def _of_piece(piece: Piece, unique: Unique) -> list[_Wanted]:
        return [
            _Wanted(tuple(piece.constants[old] for old in made_of), unique.pack.get(i, ""))
            for i, made_of in enumerate(unique.lowered.constants)
        ]

    def _recipe(self, wanted: _Wanted) -> Recipe:
        node, path = self._weights[wanted.names[0]]
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        sources = tuple(self._source(name) for name in wanted.names)
        source = sources[0] if len(sources) == 1 else Concat(sources)
        if isinstance(source, Take) and not source.also:
            literal = wanted.names[0] in path.captured.literals
            return Recipe(source.name, source.shape, dtype, literal, wanted.pack)
        return Recipe(label(source), source.shape, dtype, pack=wanted.pack, source=source)

    def _source(self, name: str) -> Source:
        node, path = self._weights[name]
        shape = tuple(int(d) for d in node.meta["val"].shape)
        source = path.captured.request.sources.get(name, Take(name, shape))
        if source.shape != shape:
            raise InternalError(f"{name} of shape {shape} has a source of shape {source.shape}")
        return source


def _unique_piece(unique: Unique, ranges: Sequence[ShapeRange]) -> UniquePiece:
    program = unique.captured
    specs = (*program.inputs, *program.constants)
    made_of = unique.lowered.constants
    return UniquePiece(
        fingerprint=program.fingerprint(),
        program=unique.program.fingerprint(),
        ranges=tuple(ranges),
        num_ops=len(program.calls),
        num_constants=len(program.constants),
        device=specs[0].device if specs else "cpu",
        merged=made_of if any(len(constants) > 1 for constants in made_of) else (),
    )


def _plan_inputs(captured: CapturedGraph, constants: _Constants) -> tuple[PlanInput, ...]:
    """Return the inputs in the order of their slots: arguments, held buffers, objects."""
    given = {i.name: i for i in captured.request.inputs}
    kept = kept_memory(captured.graph, opaque=captured.request.opaque)
    made = [
        _plan_input(given[i.name], i.node, written=i.node in kept)
        for i in captured.inputs
        if i.kind is InputKind.ARGUMENT
    ]
    held = [
        PlanInput(
            name=i.name,
            shape=tuple(int(d) for d in i.node.meta["val"].shape),
            dtype=str(i.node.meta["val"].dtype).removeprefix("torch."),
            device=captured.request.device,
            written=True,
            recipe=constants.of_held(i.name),
        )
        for i in captured.inputs
        if i.kind is InputKind.HELD
    ]
    return (*made, *held, *(PlanInput(name=name) for name in captured.request.objects))


def _plan_input(given: TensorInput | SizeInput, node: torch.fx.Node, *, written: bool) -> PlanInput:
    if isinstance(given, SizeInput):
        return PlanInput(name=given.name, size=given.size)
    stride = given.stride if given.stride is not None and not node.meta["val"].is_contiguous() else None
    return PlanInput(
        name=given.name,
        shape=given.shape,
        dtype=given.dtype,
        device=given.device,
        stride=stride,
        written=written,
    )


def _state(request: CaptureRequest, name: str) -> State:
    given = request.states[name]
    return State(name=name, shape=given.shape, dtype=given.dtype, device=request.device)


class _Planner:
    """Puts one forward's values into slots."""

    def __init__(
        self, path: Forward, number: int, pieces: Deduplicated, *, constants: _Constants, instances: list[Instance]
    ) -> None:
        self._path = path
        self._number = number
        self._captured = path.captured
        self._pieces = pieces
        self._constants = constants
        self._instances = instances
        self._known = {instance: n for n, instance in enumerate(instances)}
        inputs = path.captured.inputs
        self._arguments = [i for i in inputs if i.kind in (InputKind.ARGUMENT, InputKind.HELD)]
        self._weights = {i.node: i.name for i in inputs if i.kind is InputKind.WEIGHT}
        self._states = {i.node: i.name for i in inputs if i.kind is InputKind.STATE}
        self._slots: dict[torch.fx.Node, int] = {i.node: n for n, i in enumerate(self._arguments)}
        objects = path.captured.request.objects.values()
        self._objects = {id(value): n for n, value in enumerate(objects, len(self._arguments))}
        self._free: list[int] = []
        self._num_slots = self._num_inputs = len(self._arguments) + len(self._objects)
        self._ending = self._last_uses()

    def steps(self) -> PlanVariant:
        """Return the steps; they add their instances to the common list."""
        out: list[PieceStep | OpStep] = []
        for number, step in enumerate(self._path.steps):
            if isinstance(step, Piece):
                unique = self._pieces.index_of[self._number, number]
                instance = self._instance(Instance(unique, self._constants.of_step(self._number, number)))
                inputs = tuple(self._slot(n) for n in step.inputs)
                self._release(number)
                outputs = tuple(self._define(n) for n in step.outputs)
                out.append(PieceStep(instance, inputs, outputs))
            else:
                out.append(self._op_step(number, step))
        results = self._results()
        variant = self._path.variant
        name, where = (variant.name, variant.where) if variant is not None else ("", Where())
        return PlanVariant(name, where, tuple(out), self._num_slots, results)

    def _instance(self, instance: Instance) -> int:
        """Return the number of an instance; forwards share those that are the same."""
        if instance not in self._known:
            self._known[instance] = len(self._instances)
            self._instances.append(instance)
        return self._known[instance]

    def _op_step(self, number: int, step: OpaqueCall) -> OpStep:
        operator = operator_of(step.node.target)
        assert operator is not None
        packable = packable_argument(step.node)
        weight = packable.weight if packable is not None else None
        args = tuple(self._op_argument(a, packable=weight) for a in step.node.args)
        kwargs = {k: self._op_argument(v, packable=weight) for k, v in step.node.kwargs.items()}
        if packable is not None and packable.weight in self._weights:
            _, packed = self._constants.of_parameter(self._weights[packable.weight], packable=True)
            kwargs.update({packable.flag: {"const": True}} if packed else {})
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

    def _op_argument(self, value: Any, *, packable: torch.fx.Node | None) -> Any:
        if isinstance(value, torch.fx.Node):
            if value in self._states:
                return {"state": self._constants.states.index(self._states[value])}
            if value in self._weights:
                number, _ = self._constants.of_parameter(self._weights[value], packable=value is packable)
                return {"recipe": number}
            size = value.meta.get("val")
            if isinstance(size, torch.SymInt):
                return {"size": self._named_sizes(str(size.node.expr))}
            return {"slot": self._slot(value)}
        if isinstance(value, (list, tuple)):
            return {"list": [self._op_argument(v, packable=None) for v in value]}
        if id(value) in self._objects:
            return {"slot": self._objects[id(value)]}
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
            if node in self._slots and self._slots[node] >= self._num_inputs:
                self._free.append(self._slots[node])

    def _last_uses(self) -> dict[int, list[torch.fx.Node]]:
        """Return, for each step, the values that are used for the last time there."""
        last: dict[torch.fx.Node, int] = {}
        for number, step in enumerate(self._path.steps):
            used = step.inputs if isinstance(step, Piece) else _nodes_in(step.node)
            for node in used:
                last[node] = number
        for node in self._output_nodes():
            last[node] = len(self._path.steps)
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


def _nodes_in(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the nodes among a call's arguments, in order, each as often as it occurs."""
    found: list[torch.fx.Node] = []
    torch.fx.map_arg((node.args, node.kwargs), found.append)
    return found
