"""The steps of a plan as calls over slots: what a loaded model runs, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from piecework.bundle.plan import OpStep, PieceStep
from piecework.bundle.sizes import size_expression

Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
StepCall = Callable[[list[Any], Mapping[str, int]], None]
Fixed = Callable[[Mapping[str, Any]], Any]


def op_call(step: OpStep, function: Callable[..., Any], *, fixed: Fixed) -> StepCall:
    """Return the call of an opaque op.

    Args:
        step: which op, on what, and where its results go.
        function: what implements it.
        fixed: returns an argument that is the same in every call: a state, a constant, a layer's handle.
    """
    always: list[Any] = []
    from_slots: list[tuple[int, int]] = []
    from_sizes: list[tuple[int, Callable[[Mapping[str, int]], int]]] = []
    for position, argument in enumerate([*step.args, *step.kwargs.values()]):
        always.append(None if _varies(argument) else fixed(argument))
        if "slot" in argument:
            from_slots.append((position, argument["slot"]))
        elif "size" in argument:
            from_sizes.append((position, size_expression(argument["size"])))
        elif "list" in argument and _varies(argument):
            return _op_call_with_lists(step, function, fixed=fixed)
    names = tuple(step.kwargs)
    outputs = step.outputs

    def call(slots: list[Any], sizes: Mapping[str, int]) -> None:
        values = always.copy()
        for position, slot in from_slots:
            values[position] = slots[slot]
        for position, compute in from_sizes:
            values[position] = compute(sizes)
        if names:
            count = len(values) - len(names)
            result = function(*values[:count], **dict(zip(names, values[count:], strict=True)))
        else:
            result = function(*values)
        if len(outputs) == 1:
            slots[outputs[0]] = result if not isinstance(result, (tuple, list)) else result[0]
        else:
            for slot, value in zip(outputs, result, strict=False) if outputs else ():
                if slot >= 0:
                    slots[slot] = value

    return call


def _op_call_with_lists(step: OpStep, function: Callable[..., Any], *, fixed: Fixed) -> StepCall:
    """Like `op_call`, for ops that take lists of tensors or sizes."""
    args = [_reader(a, fixed) for a in step.args]
    kwargs = {name: _reader(a, fixed) for name, a in step.kwargs.items()}

    def call(slots: list[Any], sizes: Mapping[str, int]) -> None:
        result = function(
            *(read(slots, sizes) for read in args), **{n: read(slots, sizes) for n, read in kwargs.items()}
        )
        results = result if isinstance(result, (tuple, list)) else [result]
        for slot, value in zip(step.outputs, results, strict=False):
            if slot >= 0:
                slots[slot] = value

    return call


def _reader(argument: Mapping[str, Any], fixed: Fixed) -> Callable[[list[Any], Mapping[str, int]], Any]:
    """Return what reads an argument in a call."""
    if "slot" in argument:
        slot = argument["slot"]
        return lambda slots, sizes: slots[slot]
    if "size" in argument:
        size = size_expression(argument["size"])
        return lambda slots, sizes: size(sizes)
    if "list" in argument:
        parts = [_reader(a, fixed) for a in argument["list"]]
        return lambda slots, sizes: [read(slots, sizes) for read in parts]
    value = fixed(argument)
    return lambda slots, sizes: value


def piece_call(step: PieceStep, run: Run) -> StepCall:
    """Return the call of a piece by its instance's run function."""
    inputs, outputs = step.inputs, step.outputs
    if len(outputs) == 1:
        (only,) = outputs

        def call_one(slots: list[Any], sizes: Mapping[str, int]) -> None:
            slots[only] = run([slots[i] for i in inputs])[0]

        return call_one

    def call(slots: list[Any], sizes: Mapping[str, int]) -> None:
        for slot, value in zip(outputs, run([slots[i] for i in inputs]), strict=True):
            slots[slot] = value

    return call


def _varies(argument: Mapping[str, Any]) -> bool:
    """Whether an op's argument differs from call to call."""
    return "slot" in argument or "size" in argument or any(_varies(a) for a in argument.get("list", ()))
