"""The plan executor: a loaded model runs straight-line calls of instances and opaque ops over slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from piecework.bundle.plan import OpStep, PieceStep, Plan, PlanInput, PlanVariant, Step
from piecework.bundle.record import Record
from piecework.bundle.run.arguments import bind_arguments
from piecework.bundle.run.states import zeros
from piecework.bundle.run.step_calls import Run, StepCall, op_call, piece_call
from piecework.bundle.run.structure import match, unflatten
from piecework.bundle.sizes import Size, names_in, size_expression
from piecework.bundle.structures import check_structure
from piecework.errors import CapacityError, InternalError, RequestError, ShapeContractError
from piecework.ops.ir.decode import decode
from piecework.ops.ir.layer import LayerName
from piecework.ops.ir.selection import Bodies, Selection
from piecework.ops.opaque import implementation


@dataclass(frozen=True)
class RangeForm:
    """The instances' run functions for one range of the primary size."""

    min: int
    max: int
    runs: tuple[Run, ...]


class LoadedModel:
    """A bundle with weights bound to it.

    `model(*args)` takes and returns what the compiled module's forward does; `run` takes the plan's named inputs and
    returns the flat results. Sizes are checked against the declared ranges at every call.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        forms: Sequence[RangeForm],
        constants: Sequence[torch.Tensor],
        record: Record,
        kernels: Mapping[str, Callable[..., Any]] | None = None,
        natives: Mapping[str, Selection] | None = None,
        owned: object = None,
    ) -> None:
        self.plan = plan
        self.record = record
        self._constants = constants  # instances hold bare pointers to these
        self._held = {i.name: constants[i.recipe] for i in plan.inputs if i.recipe is not None}
        self._kernels = kernels or {}  # native implementations of opaque ops by "namespace::name"
        self._natives = natives or {}  # what is selected inside opaque ops by "namespace::name"
        self._owned = owned
        self._layers: dict[str, LayerName] = {}
        self._states: list[torch.Tensor] | None = None if plan.states else []
        self._forms = forms
        self._rest = plan.rest
        self._programs: dict[str, list[tuple[int, int, list[StepCall]]]] = {}
        self._checks = _size_checks(plan)
        self._computed_sizes = _computed_size_checks(plan)
        self._labels: Sequence[str] | None = None
        self._device = next((i.device for i in plan.inputs if i.device not in ("", "cpu")), None)
        self._tensors = _tensor_checks(plan)
        self._returns_sizes = bool(check_structure(plan.structure, leaves=range(len(plan.output_slots))))
        if not plan.states:
            self._prepare()

    @property
    def plan_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that `run` takes, in order."""
        return tuple(i.name for i in self.plan.inputs if i.recipe is None)

    def make_states(self, sizes: Mapping[str, int]) -> None:
        """Allocate the states (KV caches), zeroed; `sizes` gives the declared sizes in their shapes, such as "blocks".

        Raises CapacityError where memory does not suffice, ShapeContractError where a size is outside its range,
        RequestError where one is missing.
        """
        for name, value in sizes.items():
            self._check_range(name, value)
        missing = sorted({name for s in self.plan.states for d in s.shape for name in names_in(str(d))} - sizes.keys())
        if missing:
            raise RequestError(
                asked=f"allocate {len(self.plan.states)} states with {dict(sizes)}",
                found=f"no size {missing[0]!r}, which their shapes have",
                try_="give all of them",
            )
        try:
            self._states = [
                zeros([size_expression(str(d))(sizes) for d in s.shape], dtype=getattr(torch, s.dtype), device=s.device)
                for s in self.plan.states
            ]
        except (RuntimeError, ArithmeticError, MemoryError, OSError) as error:
            raise CapacityError(
                asked=f"allocate {len(self.plan.states)} states with {dict(sizes)}",
                found=str(error).splitlines()[0],
                try_="ask for fewer blocks",
            ) from error
        self._prepare()

    @property
    def states(self) -> Mapping[str, torch.Tensor]:
        """The states by name, and the buffers that the forward changes: those of the module whose weights are bound."""
        states = {s.name: t for s, t in zip(self.plan.states, self._states or [], strict=False)}
        return {**states, **self._held}

    def run(self, inputs: Mapping[str, torch.Tensor | int]) -> list[torch.Tensor]:
        """Run one forward on named inputs and return the flat results.

        Raises ShapeContractError where a size is outside its declared range or two inputs disagree about it,
        RequestError where an input is missing.
        """
        values: list[Any] = []
        for given in self.plan.inputs:
            if given.recipe is not None:
                values.append(self._held[given.name])
                continue
            if given.name not in inputs:
                raise RequestError(
                    asked="run the loaded model",
                    found=f"no input {given.name!r}",
                    try_="pass " + ", ".join(self.plan_inputs),
                )
            values.append(inputs[given.name])
        return self._run(values)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model as the compiled module was called with its example arguments."""
        layout = self.plan.arguments
        if layout is None:
            raise RequestError(
                asked="call the model like a module",
                found="the bundle was compiled from named inputs",
                try_="use run({name: tensor, ...}) with " + ", ".join(self.plan_inputs),
            )
        given = bind_arguments(layout, args, kwargs)
        leaves: list[Any] = []
        for name, structure in layout["given"]:
            match(structure, given[name], where=name, leaves=leaves)
        leaves += self._held.values()
        sizes = self._sizes(leaves) if self._returns_sizes else {}
        return unflatten(self.plan.structure, self._run(leaves), sizes)

    def close(self) -> None:
        """Let go of weights, states and libraries; the model can't be called afterwards."""
        self._programs = {}
        self._forms = ()
        self._states = None
        self._held = {}
        self._constants = ()
        for bodies in self._bodies():
            bodies.clear()
        self._natives = {}
        self._owned = None

    @property
    def native_fallbacks(self) -> Mapping[str, int]:
        """How many calls of IR ops inside opaque ops ran uncompiled, because no body was compiled for such arguments.

        By what was called: "silu_mul(float16[*, 64], float16[*, 64])".
        """
        return {call: count for bodies in self._bodies() for call, count in bodies.fallbacks.items()}

    def label_steps(self, labels: Sequence[str] | None) -> None:
        """Name the steps in torch profiler's traces, a label for each of `plan.all_steps`; None, at first: no names."""
        self._labels = labels
        if self._states is not None:
            self._prepare()

    def _run(self, values: list[Any]) -> list[torch.Tensor]:
        sizes = self._sizes(values)
        if self._device is not None:
            values = [v.to(self._device) if isinstance(v, torch.Tensor) else v for v in values]
        self._arrange(values)
        path = self._path(sizes)
        slots: list[Any] = values + [None] * (path.num_slots - len(values))
        steps = self._program(path, sizes.get(self.plan.primary, 0))
        step: StepCall | None = None
        try:
            for step in steps:
                step(slots, sizes)
        except torch.OutOfMemoryError as error:
            raise CapacityError(asked=f"run with {sizes}", found=str(error), try_="run with smaller sizes") from error
        except _FAILURES as error:
            number = next(i for i, each in enumerate(steps) if each is step)
            raise _failed(path.steps[number], number, error) from error
        return [slots[i] for i in path.output_slots]

    def _bodies(self) -> list[Bodies]:
        found = [s.bodies for s in self._natives.values() if s.bodies is not None]
        return list(dict.fromkeys(found))

    def _path(self, sizes: Mapping[str, int]) -> PlanVariant:
        for variant in self.plan.variants:
            if variant.where.holds(sizes):
                return variant
        return self._rest

    def _program(self, path: PlanVariant, primary: int) -> list[Any]:
        for low, high, steps in self._programs.get(path.name, ()):
            if low <= primary <= high:
                return steps
        if self._states is None:
            raise RequestError(
                asked="run the loaded model",
                found="it is closed, or its states (KV caches) are not allocated",
                try_="call make_states({...}) first",
            )
        raise InternalError(f"no artifact for {self.plan.primary} = {primary}")

    def _prepare(self) -> None:
        assert self._states is not None
        self._programs = {}
        begin = 0
        for path in self.plan.forwards:
            labels = None if self._labels is None else self._labels[begin : begin + len(path.steps)]
            begin += len(path.steps)
            ops = {i: self._op(s) for i, s in enumerate(path.steps) if isinstance(s, OpStep)}
            self._programs[path.name] = [
                (form.min, form.max, _labelled(_calls(path.steps, form, ops), labels)) for form in self._forms
            ]

    def _selecting(self, step: OpStep, call: StepCall) -> StepCall:
        """Let the IR ops that a step calls find the model's own bodies, where it has any for that step."""
        selection = self._natives.get(step.op.partition(".")[0])
        return call if selection is None else partial(selection.running, call)

    def _op(self, step: OpStep) -> StepCall:
        assert self._states is not None
        function = self._kernels.get(step.op.partition(".")[0]) or implementation(step.op)
        return self._selecting(step, op_call(step, function, fixed=self._fixed))

    def _fixed(self, argument: Mapping[str, Any]) -> Any:
        if "state" in argument:
            assert self._states is not None
            return self._states[argument["state"]]
        if "recipe" in argument:
            return self._constants[argument["recipe"]]
        if "list" in argument:
            return [self._fixed(a) for a in argument["list"]]
        if "layer" in argument:
            return self._layers.setdefault(argument["layer"], LayerName(argument["layer"]))
        return argument["const"] if "const" in argument else decode(argument, _no_reference)

    def _sizes(self, values: Sequence[Any]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for position, axis, name, given in self._checks:
            value = values[position]
            try:
                found = value if axis < 0 else value.shape[axis]
            except (AttributeError, IndexError):
                raise _wrong_shape(given, value) from None
            if isinstance(name, int):
                if found != name:
                    raise _wrong_shape(given, value)
            elif type(found) is not int:
                raise _wrong_shape(given, value)
            elif sizes.setdefault(name, found) != found:
                raise ShapeContractError(
                    asked=f"run with {given.name} of {name} = {found}",
                    found=f"another input has {name} = {sizes[name]}",
                    try_="pass inputs whose sizes agree",
                )
        for name, found in sizes.items():
            low, high = self.plan.sizes[name]
            if not low <= found <= high:
                self._check_range(name, found)
        for position, axis, size, given in self._computed_sizes:
            if values[position].shape[axis] != size(sizes):
                raise _wrong_shape(given, values[position])
        return sizes

    def _arrange(self, values: list[Any]) -> None:
        """Bring tensors into the layout that the pieces were compiled for; refuse other types and ranks."""
        for position, dtype, rank, given in self._tensors:
            value = values[position]
            if not isinstance(value, torch.Tensor):
                raise _wrong_shape(given, value)
            if value.dtype is not dtype or value.device.type != given.device:
                raise RequestError(
                    asked=f"run with {given.name} in {value.dtype} on {value.device}",
                    found=f"the bundle was compiled for {given.dtype} on {given.device}",
                    try_="convert it with .to()",
                )
            if value.dim() != rank:
                raise _wrong_shape(given, value)
            wanted = value.is_contiguous() if given.stride is None else value.stride() == given.stride
            if wanted:
                continue
            if given.written:
                raise _wrong_layout(given, value)
            if given.stride is None:
                values[position] = value.contiguous()
            else:
                values[position] = torch.empty_strided(
                    value.shape, given.stride, dtype=dtype, device=value.device
                ).copy_(value)

    def _check_range(self, name: str, value: int) -> None:
        low, high = self.plan.sizes.get(name, (0, 1 << 62))
        if not low <= value <= high:
            raise ShapeContractError(
                asked=f"run with {name} = {value}",
                found=f"the bundle was compiled for {low} to {high}",
                try_="split the input, or compile for a larger range",
            )


_FAILURES: Final = (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
"""What a step raises of values that it doesn't take: its shapes and types were checked when the bundle was loaded."""


def _failed(step: Step, number: int, error: Exception) -> RequestError:
    what = f"piece instance {step.instance}" if isinstance(step, PieceStep) else step.op
    first = str(error).strip().partition("\n")[0]
    return RequestError(
        asked=f"run step {number} of the loaded model, {what}",
        found=f"{type(error).__name__}: {first[:300]}",
        try_="check the values of the inputs, indices above all",
    )


def _calls(steps: Sequence[Step], form: RangeForm, ops: Mapping[int, StepCall]) -> list[StepCall]:
    return [piece_call(s, form.runs[s.instance]) if isinstance(s, PieceStep) else ops[i] for i, s in enumerate(steps)]


def _labelled(calls: list[StepCall], labels: Sequence[str] | None) -> list[StepCall]:
    if labels is None:
        return calls
    return [_labelled_call(call, label) for call, label in zip(calls, labels, strict=True)]


def _no_reference(kind: str, index: int) -> Any:
    raise InternalError(f"a plan step with an argument of kind {kind!r}")


def _labelled_call(call: StepCall, label: str) -> StepCall:
    def labelled(slots: list[Any], sizes: Mapping[str, int]) -> None:
        with torch.profiler.record_function(label):
            call(slots, sizes)

    return labelled


def _size_checks(plan: Plan) -> list[tuple[int, int, int | str, PlanInput]]:
    """Return (position, axis, size or number, input) for every axis to check; axis -1 is an integer input itself."""
    checks: list[tuple[int, int, int | str, PlanInput]] = []
    for position, given in enumerate(plan.inputs):
        if given.recipe is not None:
            continue
        if given.shape is None:
            checks += [(position, -1, given.size, given)] if given.size else []
        else:
            checks += [
                (position, axis, dim, given)
                for axis, dim in enumerate(given.shape)
                if isinstance(dim, int) or dim in plan.sizes
            ]
    return checks


def _computed_size_checks(plan: Plan) -> list[tuple[int, int, Size, PlanInput]]:
    """Return (position, axis, size, input) for every axis whose size is an expression over others."""
    return [
        (position, axis, size_expression(dim), given)
        for position, given in enumerate(plan.inputs)
        if given.recipe is None
        for axis, dim in enumerate(given.shape or ())
        if isinstance(dim, str) and dim not in plan.sizes
    ]


def _tensor_checks(plan: Plan) -> list[tuple[int, torch.dtype, int, PlanInput]]:
    """Return (position, dtype, rank, input) for every tensor input."""
    return [
        (position, getattr(torch, given.dtype), len(given.shape), given)
        for position, given in enumerate(plan.inputs)
        if given.shape is not None and given.recipe is None
    ]


def _wrong_layout(given: PlanInput, value: torch.Tensor) -> RequestError:
    return RequestError(
        asked=f"run with {given.name} of strides {list(value.stride())}, which the forward writes to",
        found="the bundle was compiled for "
        + (f"the strides {list(given.stride)}" if given.stride is not None else "a contiguous one"),
        try_="pass a tensor in that layout: what is written to a copy would be lost",
    )


def _wrong_shape(given: PlanInput, value: Any) -> ShapeContractError:
    found = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    return ShapeContractError(
        asked=f"run with {given.name} of {found}",
        found=f"the bundle was compiled for {list(given.shape) if given.shape is not None else given.size}",
        try_="pass inputs of the compiled shape",
    )
