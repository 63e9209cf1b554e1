"""What a plan means, computed as plainly as can be: eager programs call by call, operators through torch's dispatcher.

It shares nothing with what runs plans but the data that they are read into, and how bodies of IR ops are found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from piecework.bundle.plan import NativeCall, OpStep, Plan, Recipe
from piecework.bundle.recipes import Concat, HeadProduct, HeadRows, Source, Stack, Take, numbered
from piecework.bundle.sizes import size_expression
from piecework.foundation.torch_private import find_overload
from piecework.ops.ir.decode import decode
from piecework.ops.ir.layer import LayerName
from piecework.ops.ir.native_bodies import NativeBodies, NativeBody
from piecework.ops.ir.program import Program
from piecework.ops.ir.provider_order import as_order
from piecework.ops.ir.resolve import resolve_target
from piecework.ops.ir.selection import Selection


class Reference:
    """A plan with weights.

    Args:
        plan: the plan.
        programs: the eager programs by fingerprint.
        weights: by name.
        literals: by name.
    """

    def __init__(
        self,
        plan: Plan,
        programs: Mapping[str, Program],
        *,
        weights: Mapping[str, Tensor],
        literals: Mapping[str, Tensor],
    ) -> None:
        self.plan = plan
        self._programs = programs
        self._constants = [_constant(r, literals if r.literal else weights) for r in plan.recipes]
        self._states: list[Tensor] = []
        order = as_order("native")
        bodies = [_body(native, programs) for native in plan.natives if native.artifact]
        selection = Selection(order, bodies=NativeBodies(order, bodies))
        self._inside = {op: selection for native in plan.natives for op in native.ops}

    def make_states(self, sizes: Mapping[str, int]) -> None:
        """Make the states, filled with zeros."""
        self._states = [
            torch.zeros([size_expression(str(d))(sizes) for d in s.shape], dtype=getattr(torch, s.dtype))
            for s in self.plan.states
        ]

    def run(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return the flat results."""
        values = [inputs[given.name] for given in self.plan.inputs]
        sizes: dict[str, int] = {}
        for given, value in zip(self.plan.inputs, values, strict=True):
            if given.shape is None:
                sizes[given.size] = value
            else:
                sizes.update((d, n) for d, n in zip(given.shape, value.shape, strict=True) if isinstance(d, str))
        steps, results = self.plan.steps, self.plan.output_slots
        for variant in self.plan.variants:
            if variant.where.holds(sizes):
                steps, results = variant.steps, variant.output_slots
                break
        slots: dict[int, Any] = dict(enumerate(values))
        for step in steps:
            made = self._op(step, slots, sizes) if isinstance(step, OpStep) else self._piece(step, slots)
            slots.update((slot, value) for slot, value in zip(step.outputs, made, strict=True))
        return [slots[i] for i in results]

    def _piece(self, step: Any, slots: Mapping[int, Any]) -> list[Any]:
        instance = self.plan.instances[step.instance]
        program = self._programs[self.plan.pieces[instance.piece].program]
        inputs = [slots[i] for i in step.inputs]
        return _computed(program, inputs, constants=[self._constants[i] for i in instance.constants])

    def _op(self, step: OpStep, slots: Mapping[int, Any], sizes: Mapping[str, int]) -> Sequence[Any]:
        def read(argument: Mapping[str, Any]) -> Any:
            ((kind, value),) = argument.items()
            if kind == "list":
                return [read(item) for item in value]
            known = {"slot": slots, "state": self._states, "recipe": self._constants}
            if kind in known:
                table: Any = known[kind]
                return table[value]
            if kind == "size":
                return size_expression(value)(sizes)
            if kind == "layer":
                return LayerName(value)
            return value if kind == "const" else decode(argument, _nothing)

        # weights are plain here
        kwargs = {name: read(a) for name, a in step.kwargs.items() if name != "packed"}
        args = [read(a) for a in step.args]
        overload, inside = find_overload(step.op), self._inside.get(step.op.partition(".")[0])
        made = overload(*args, **kwargs) if inside is None else inside.running(partial(overload, **kwargs), *args)
        return list(made) if isinstance(made, (tuple, list)) else [] if made is None else [made]


def _body(native: NativeCall, programs: Mapping[str, Program]) -> NativeBody:
    """Return what serves an IR op's calls inside opaque ops: its program, call by call."""
    assert native.piece is not None
    program = programs[native.piece.program]
    return NativeBody(native.form, provider=native.provider, run=lambda inputs: _computed(program, inputs))


def _computed(program: Program, inputs: Sequence[Any], *, constants: Sequence[Tensor] = ()) -> list[Any]:
    tables: dict[str, Any] = {"i": inputs, "c": constants, "n": []}

    def read(kind: str, index: int) -> Any:
        return tables[kind][index]

    for call in program.calls:
        args = [decode(a, read) for a in call.args]
        kwargs = {name: decode(a, read) for name, a in call.kwargs.items()}
        tables["n"].append(resolve_target(call.target)(*args, **kwargs))
    return [decode(output, read) for output in program.outputs]


def _nothing(kind: str, index: int) -> Any:
    raise AssertionError(f"a reference {kind} {index} in a plan")


def _constant(recipe: Recipe, tensors: Mapping[str, Tensor]) -> Tensor:
    made = _made(recipe.source or Take(recipe.name, recipe.shape), tensors)
    return made.to(getattr(torch, recipe.dtype)).contiguous()


def _made(source: Source, tensors: Mapping[str, Tensor]) -> Tensor:
    if isinstance(source, Take):
        return tensors[source.name]
    if isinstance(source, Concat):
        return torch.cat([_made(part, tensors) for part in source.parts])
    if isinstance(source, Stack):
        return torch.stack([_made(numbered(source.of, number), tensors) for number in range(source.count)])
    if isinstance(source, HeadRows):
        whole = _made(source.of, tensors)
        rows = whole.reshape(source.heads, -1, whole.shape[1])[:, source.begin : source.end]
        return rows.mT if source.transpose else rows
    assert isinstance(source, HeadProduct), "of a model without quantized weights"
    left, right = _made(source.left, tensors), _made(source.right, tensors)
    heads = left.reshape(left.shape[0], source.heads, -1)
    return torch.einsum("xhv,hvl->xhl", heads, right).reshape(source.shape)
