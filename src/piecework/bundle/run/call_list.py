"""Straight-line calls over numbered values: what runs a graph that was cut into pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Slot:
    """A value by its number."""

    number: int


@dataclass(frozen=True)
class PieceCall:
    """Call a compiled piece on the values `inputs`; its results become the values `outputs`."""

    run: Callable[..., Sequence[Any]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class FunctionCall:
    """Call a function; arguments are constants, `Slot`s, or lists and tuples of them.

    `output` is the value that the result becomes, `items` are parts of it: (index, value). -1 for none.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: int
    items: tuple[tuple[int, int], ...] = ()


class CallList:
    """A function of positional inputs that runs `calls` in order.

    Args:
        num_inputs: they are the values 0 … num_inputs - 1.
        constants: the values that follow.
        num_values: of all values.
        calls: see there.
        results: what is returned, as a tuple: `Slot`s or constants.

    A value is dropped after its last use. Nothing is recorded for a backward pass.
    """

    def __init__(
        self,
        *,
        num_inputs: int,
        constants: Sequence[Any],
        num_values: int,
        calls: Sequence[PieceCall | FunctionCall],
        results: Sequence[Any],
    ) -> None:
        self._constants = tuple(constants)
        self._rest = (None,) * (num_values - num_inputs - len(self._constants))
        self._results = tuple(results)
        last = _last_uses(calls, results)
        self._calls = [
            (_prepared(call), tuple(v for v, when in last.items() if when == number))
            for number, call in enumerate(calls)
        ]

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run the calls."""
        values = [*inputs, *self._constants, *self._rest]
        with torch.no_grad():
            for run, ended in self._calls:
                run(values)
                for number in ended:
                    values[number] = None
        return tuple(_filled(r, values) for r in self._results)


def _prepared(call: PieceCall | FunctionCall) -> Callable[[list[Any]], None]:
    if isinstance(call, PieceCall):
        return _piece(call.run, call.inputs, call.outputs)
    return _function(call)


def _piece(
    run: Callable[..., Sequence[Any]], inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> Callable[[list[Any]], None]:
    def step(values: list[Any]) -> None:
        for number, made in zip(outputs, run(*[values[i] for i in inputs]), strict=True):
            values[number] = made

    return step


def _function(call: FunctionCall) -> Callable[[list[Any]], None]:
    function, args, kwargs, output, items = call.function, call.args, dict(call.kwargs), call.output, call.items

    def step(values: list[Any]) -> None:
        made = function(*[_filled(a, values) for a in args], **{k: _filled(a, values) for k, a in kwargs.items()})
        if output >= 0:
            values[output] = made
        for index, number in items:
            values[number] = made[index]

    return step


def _filled(argument: Any, values: Sequence[Any]) -> Any:
    if type(argument) is Slot:
        return values[argument.number]
    if isinstance(argument, (list, tuple)):
        filled = [_filled(a, values) for a in argument]
        return tuple(filled) if isinstance(argument, tuple) else filled
    return argument


def _slots(argument: Any) -> list[int]:
    if isinstance(argument, Slot):
        return [argument.number]
    if isinstance(argument, (list, tuple)):
        return [n for a in argument for n in _slots(a)]
    return []


def _last_uses(calls: Sequence[PieceCall | FunctionCall], results: Sequence[Any]) -> dict[int, int]:
    """Return, for each value that isn't returned, the call after which nobody needs it."""
    last: dict[int, int] = {}
    for number, call in enumerate(calls):
        if isinstance(call, PieceCall):
            used = [*call.inputs, *call.outputs]
        else:
            used = [*_slots(call.args), *_slots(list(call.kwargs.values())), *(n for _, n in call.items)]
            used += [call.output] if call.output >= 0 else []
        for value in used:
            last[value] = number
    for value in _slots(list(results)):
        last.pop(value, None)
    return last
