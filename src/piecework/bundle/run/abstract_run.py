"""Run a plan on shapes alone: what each step takes must be what its artifact or operator says that it takes.

Sizes are numbers here, a few points of the declared ranges at once: the ends, and some in between that depend on the
whole plan, so that none can be made for them. A step that was seen with the same shapes is not looked at again: eighty
equal layers cost as much as one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, final

import torch

from piecework.bundle.packings import LINEAR_COLUMNS
from piecework.bundle.plan import OpStep, PieceStep, Plan, PlanVariant, Recipe
from piecework.bundle.run.fake_ops import check_arguments, fake_op
from piecework.bundle.run.sample_sizes import Point, sample_sizes
from piecework.bundle.sizes import Size, size_expression
from piecework.errors import PieceworkError
from piecework.foundation.torch_private import operator_arguments
from piecework.ops.ir.decode import decode
from piecework.ops.ir.interface import UNKNOWN, Interface
from piecework.ops.ir.layer import LayerName
from piecework.ops.ir.program import Dim, TensorSpec
from piecework.ops.mla.operators import PACKABLE
from piecework.ops.opaque import operator_of_plan

_NOT_KNOWN: Final = -1
"""In a slot whose shape nothing says."""

_MOST_ELEMENTS: Final = 1 << 52
_LAYER: Final = LayerName("")
_WRONG: Final = (
    RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, AssertionError, PieceworkError,
)  # fmt: skip
"""What fake implementations raise of arguments that they don't take."""


@dataclass(frozen=True)
class Shaped:
    """A tensor at each of the points: its sizes and strides there, its element type and device type."""

    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    dtype: str
    device: str


def run_abstractly(
    plan: Plan, path: PlanVariant, *, bounds: tuple[int, int], interfaces: Sequence[Interface], seed: str
) -> None:
    """Check the steps of one of a plan's forwards, for one range of the primary size.

    Args:
        plan: one that `check_plan` took.
        path: the forward.
        bounds: the range.
        interfaces: what the artifact of each of the plan's pieces takes and gives there.
        seed: what the sizes in between depend on.

    Raises ValueError that names the step. Where no sizes are possible at all, the forward never runs.
    """
    points = sample_sizes(plan, path, bounds=bounds, seed=seed)
    if points:
        run = _AbstractRun(plan, points, interfaces)
        run.check(path)


@final
class _AbstractRun:
    """Holds what was seen at some points: tensors by number, and steps by the numbers of what they take."""

    def __init__(self, plan: Plan, points: Sequence[Point], interfaces: Sequence[Interface]) -> None:
        self._plan = plan
        self._points = points
        self._device = plan.pieces[0].device if plan.pieces else "cpu"
        self._interfaces = interfaces
        self._numbers: dict[Shaped, int] = {}
        self._shaped: list[Shaped] = []
        self._expressions: dict[str, Size] = {}
        self._seen: dict[Any, tuple[int, ...]] = {}
        given: Any = functools.cache(self._given)
        self._recipes = [given(r.shape, None, r.dtype, self._device) for r in plan.recipes]
        self._states = [given(s.shape, None, s.dtype, s.device) for s in plan.states]

    def check(self, path: PlanVariant) -> None:
        inputs = [
            _NOT_KNOWN if i.shape is None else self._given(i.shape, i.stride, i.dtype, i.device)
            for i in self._plan.inputs
        ]
        slots = inputs + [_NOT_KNOWN] * (path.num_slots - len(inputs))
        for number, step in enumerate(path.steps):
            try:
                results = self._piece(step, slots) if isinstance(step, PieceStep) else self._op(step, slots)
            except ValueError as error:
                what = f"piece {self._plan.instances[step.instance].piece}" if isinstance(step, PieceStep) else step.op
                where = f" of the forward {path.name!r}" if path.name else ""
                raise ValueError(f"step {number}{where}, {what}: {error}") from error
            for slot, result in zip(step.outputs, results, strict=True):
                if slot >= 0:
                    slots[slot] = result

    def _number(self, shaped: Shaped) -> int:
        if shaped not in self._numbers:
            numbers = [n for several in (*shaped.shapes, *shaped.strides) for n in several]
            if min(numbers, default=0) < 0 or max([*numbers, *map(prod, shaped.shapes)]) > _MOST_ELEMENTS:
                raise ValueError(f"a tensor of shape {list(shaped.shapes[-1])}")
            self._numbers[shaped] = len(self._shaped)
            self._shaped.append(shaped)
        return self._numbers[shaped]

    def _value(self, dim: Dim, sizes: Point) -> int:
        """Return a size. Raises KeyError where it is made of an unknown one, ValueError where it divides by 0."""
        if isinstance(dim, int):
            return dim
        if dim not in self._expressions:
            self._expressions[dim] = size_expression(dim)
        try:
            return self._expressions[dim](sizes)
        except ZeroDivisionError:
            raise ValueError(f"a size {dim!r} that divides by 0") from None

    def _given(self, shape: Sequence[Dim], stride: Sequence[int] | None, dtype: str, device: str) -> int:
        shapes = tuple(tuple(self._value(d, point) for d in shape) for point in self._points)
        strides = tuple(_packed(s) if stride is None else tuple(stride) for s in shapes)
        return self._number(Shaped(shapes, strides, dtype, device))

    def _piece(self, step: PieceStep, slots: Sequence[int]) -> tuple[int, ...]:
        instance = self._plan.instances[step.instance]
        inputs = tuple(slots[i] for i in step.inputs)
        constants = tuple((self._recipes[c], self._plan.recipes[c].pack) for c in instance.constants)
        key = instance.piece, inputs, constants
        if key not in self._seen:
            self._seen[key] = self._unified(self._interfaces[instance.piece], inputs, constants)
        if len(self._seen[key]) != len(step.outputs):
            raise ValueError(f"{len(step.outputs)} results, where its artifact gives {len(self._seen[key])}")
        return self._seen[key]

    def _unified(
        self, interface: Interface, inputs: Sequence[int], constants: Sequence[tuple[int, str]]
    ) -> tuple[int, ...]:
        """Return what an artifact gives for some tensors; raises ValueError where it doesn't take them."""
        if (len(inputs), len(constants)) != (len(interface.inputs), len(interface.constants)):
            raise ValueError(
                f"{len(inputs)} inputs and {len(constants)} constants, "
                f"where its artifact takes {len(interface.inputs)} and {len(interface.constants)}"
            )
        if tuple(pack for _, pack in constants) != interface.packs:
            raise ValueError("constants that are packed otherwise than its artifact takes them")
        declared = [*interface.inputs, *interface.constants]
        given = [*inputs, *(number for number, _ in constants)]
        envs = [self._bound(interface, declared, given, point) for point in range(len(self._points))]
        return tuple(self._result(spec, envs) for spec in interface.results)

    def _bound(
        self, interface: Interface, declared: Sequence[TensorSpec], given: Sequence[int], point: int
    ) -> Mapping[str, int]:
        """Return an artifact's sizes at a point, as its tensors have them."""
        sizes: dict[str, int] = {}
        symbols = {name for name, _, _ in interface.symbols}
        tensors = [(spec, self._shaped[n]) for spec, n in zip(declared, given, strict=True) if n != _NOT_KNOWN]
        for place, (spec, shaped) in enumerate(tensors):
            found = shaped.shapes[point]
            if (spec.dtype, spec.device, len(spec.shape)) != (shaped.dtype, shaped.device, len(found)):
                raise ValueError(f"tensor {place} is {_text(shaped, point)}, where {_declared(spec)} belongs")
            for dim, size in zip(spec.shape, found, strict=True):
                if isinstance(dim, str) and dim in symbols and sizes.setdefault(dim, size) != size:
                    raise ValueError(f"{dim} is {sizes[dim]} in one tensor and {size} in tensor {place}")
        for place, (spec, shaped) in enumerate(tensors):
            if not self._agrees(spec, shaped, point, sizes):
                raise ValueError(f"tensor {place} is {_text(shaped, point)}, where {_declared(spec)} belongs")
        for name, low, high in interface.symbols:
            if not low <= sizes.get(name, low) <= high:
                raise ValueError(f"{name} = {sizes[name]}, where its artifact was compiled for {low} to {high}")
        return sizes

    def _agrees(self, spec: TensorSpec, shaped: Shaped, point: int, sizes: Mapping[str, int]) -> bool:
        found = shaped.shapes[point]
        try:
            shape = tuple(self._value(dim, sizes) for dim in spec.shape)
            strides = tuple(self._value(dim, sizes) for dim in spec.stride)
        except KeyError:
            return False
        return shape == found and _same_layout(found, strides, shaped.strides[point])

    def _result(self, spec: TensorSpec, envs: Sequence[Mapping[str, int]]) -> int:
        if UNKNOWN in (*spec.shape, *spec.stride):
            return _NOT_KNOWN
        try:
            shapes = tuple(tuple(self._value(d, env) for d in spec.shape) for env in envs)
            strides = tuple(tuple(self._value(d, env) for d in spec.stride) for env in envs)
        except KeyError:
            return _NOT_KNOWN
        return self._number(Shaped(shapes, strides, spec.dtype, spec.device))

    def _op(self, step: OpStep, slots: Sequence[int]) -> tuple[int, ...]:
        names = tuple(step.kwargs)
        arguments = (*step.args, *step.kwargs.values())
        key = step.op, names, tuple(self._key(a, slots) for a in arguments), len(step.outputs)
        if key not in self._seen:
            self._seen[key] = self._faked(step, slots)
        return self._seen[key]

    def _key(self, argument: Mapping[str, Any], slots: Sequence[int]) -> Any:
        """Return what tells an operator's arguments apart as far as shapes go: layers' names don't."""
        ((kind, value),) = argument.items()
        match kind:
            case "slot":
                return slots[value]
            case "state":
                return kind, self._states[value]
            case "recipe":
                return kind, self._recipes[value], self._plan.recipes[value].pack
            case "list":
                return kind, tuple(self._key(a, slots) for a in value)
            case "layer":
                return kind
        return kind, type(value), value

    def _faked(self, step: OpStep, slots: Sequence[int]) -> tuple[int, ...]:
        """Return what an operator gives, by its fake implementation."""
        op = fake_op(operator_of_plan(step.op))
        _check_packed(step, op.overload, self._plan.recipes)
        unknown = False
        results: list[list[torch.Tensor]] = []
        refused: list[ValueError] = []
        for point in range(len(self._points)):

            def read(argument: Mapping[str, Any], at: int = point) -> Any:
                return self._argument(argument, slots, at)

            args, kwargs = [read(a) for a in step.args], {n: read(a) for n, a in step.kwargs.items()}
            if point == 0:  # types are the same at all points
                check_arguments(op.overload, args, kwargs)
                tensors = _tensors([*args, *kwargs.values()])
                unknown = op.run is None or not tensors or any(s == _NOT_KNOWN for s in _slots_in(step, slots))
            if not unknown and op.run is not None:
                try:
                    made = _called(op.run, args, kwargs)
                except ValueError as error:
                    refused.append(error)
                    continue
                unknown = made is None
                results.append(made or [])
        if refused and (not results or step.op.startswith("piecework::")):
            raise refused[0]
        if unknown or refused:  # of sizes that don't go together, for which nothing in a plan relates them
            return (_NOT_KNOWN,) * len(step.outputs)
        return self._results(results, step)

    def _results(self, results: Sequence[Sequence[torch.Tensor]], step: OpStep) -> tuple[int, ...]:
        if len(results[0]) != len(step.outputs):
            raise ValueError(f"{len(step.outputs)} results, where it gives {len(results[0])}")
        return tuple(
            self._number(
                Shaped(
                    tuple(tuple(t.shape) for t in several),
                    tuple(t.stride() for t in several),
                    str(several[0].dtype).removeprefix("torch."),
                    self._device,
                )
            )
            for several in zip(*results, strict=True)
        )

    def _argument(self, argument: Mapping[str, Any], slots: Sequence[int], point: int) -> Any:
        ((kind, value),) = argument.items()
        match kind:
            case "slot" | "state" | "recipe":
                table: Sequence[int] = {"slot": slots, "state": self._states, "recipe": self._recipes}[kind]
                return self._stand_in(table[value], point)
            case "size":
                return self._value(value, self._points[point])
            case "layer":
                return _LAYER
            case "list":
                return [self._argument(a, slots, point) for a in value]
            case "const":
                return value
        return torch.device("meta") if kind == "device" else decode(argument, _no_reference)

    def _stand_in(self, number: int, point: int) -> torch.Tensor:
        if number == _NOT_KNOWN:
            return torch.empty(0, device="meta")
        shaped = self._shaped[number]
        shape, stride = shaped.shapes[point], shaped.strides[point]
        return torch.empty_strided(shape, stride, dtype=getattr(torch, shaped.dtype), device="meta")


def _called(run: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor] | None:
    """Return the tensors that an operator gives, None where that can't be known. Raises ValueError where it refuses."""
    try:
        with torch.no_grad():
            made = run(*args, **kwargs)
    except NotImplementedError:
        return None
    except _WRONG as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"it doesn't take such arguments: {first[0][:200]}") from error
    results = list(made) if isinstance(made, (tuple, list)) else [] if made is None else [made]
    return results if all(isinstance(r, torch.Tensor) for r in results) else None


def _check_packed(step: OpStep, overload: Any, recipes: Sequence[Recipe]) -> None:
    """Raise ValueError where an operator is given a packed weight that it takes for a plain one, or the reverse."""
    names = [argument.name for argument in operator_arguments(overload)]
    named = {**dict(zip(names, step.args, strict=False)), **step.kwargs}
    parameter, flag = PACKABLE.get(step.op.partition(".")[0], ("", ""))
    says = named.get(flag) == {"const": True}
    for name, argument in named.items():
        wanted = LINEAR_COLUMNS if name == parameter and says else ""
        given = recipes[argument["recipe"]].pack if "recipe" in argument else ""
        if given != wanted:
            raise ValueError(f"{name!r} is packed otherwise than it is said to be")


def _slots_in(step: OpStep, slots: Sequence[int]) -> list[int]:
    found: list[int] = []

    def collect(argument: Mapping[str, Any]) -> None:
        if "slot" in argument:
            found.append(slots[argument["slot"]])
        for inner in argument.get("list", ()):
            collect(inner)

    for argument in (*step.args, *step.kwargs.values()):
        collect(argument)
    return found


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item for item in flat if isinstance(item, torch.Tensor)]


def _packed(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(1, shape[axis + 1])
    return tuple(strides)


def _same_layout(shape: Sequence[int], one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether strides are the same, as far as they matter."""
    if one == other or prod(shape) == 0:
        return True
    return all(a == b for size, a, b in zip(shape, one, other, strict=True) if size > 1)


def _text(shaped: Shaped, point: int) -> str:
    sizes, strides = list(shaped.shapes[point]), list(shaped.strides[point])
    return f"{shaped.dtype}{sizes} of strides {strides} on {shaped.device}"


def _declared(spec: TensorSpec) -> str:
    return f"{spec.dtype}{list(spec.shape)} of strides {list(spec.stride)} on {spec.device}"


def _no_reference(kind: str, index: int) -> Any:
    raise ValueError(f"a reference {kind!r} in a plan")
