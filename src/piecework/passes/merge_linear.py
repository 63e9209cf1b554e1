"""Linear layers that read the same tensor become one, whose weight is theirs one below the other.

before: a = linear(x, w0); b = linear(x, w1)
after:  m = linear(x, concat(w0, w1)); a = m[..., :n]; b = m[..., n:]

Query, key and value, or gate and up: one larger product reads its input once, waits for its threads once, and at one
token comes nearer to what memory gives. Weights are concatenated by the plan's recipe, at load.

Applies to weights that nothing else uses, of one dtype, either all with a bias or all without. The results are slices
and no longer contiguous, so the pass checks its work: shapes and types of everything that leaves the piece must be what
they were, and strides too where another piece reads it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from piecework.ops.program import Call, Program, TensorSpec, references
from piecework.passes.verify import same_results

_LINEAR = "piecework.linear.default"
_SLICE = "aten.slice.Tensor"


@dataclass(frozen=True)
class Merged:
    """A program after the pass.

    Attributes:
        program: the program.
        constants: for each of its constants, the constants of the program before that it concatenates (one: as it was).
        notes: what was merged, and what nearly was, for people.
    """

    program: Program
    constants: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()


def unmerged(program: Program) -> Merged:
    """Return the program as it is."""
    return Merged(program, tuple((index,) for index in range(len(program.constants))))


def merge_linear(program: Program, *, strict_outputs: frozenset[int]) -> Merged:
    """Merge what can be.

    Args:
        program: a piece's.
        strict_outputs: positions of results that must keep their strides.
    """
    made = unmerged(program)
    groups, notes = _groups(program)
    for group in groups:
        candidate = _merge(made, [_position(made, first) for first in group])
        wrong = same_results(program, candidate.program, strict_outputs=strict_outputs)
        if wrong is None:
            made = replace(candidate, notes=made.notes)
            notes.append(f"merged {len(group)} linear layers of {_widths(program, group)} outputs")
        else:
            notes.append(f"not merged, {len(group)} linear layers of {_widths(program, group)} outputs: {wrong}")
    return replace(made, notes=tuple(notes))


def _groups(program: Program) -> tuple[list[list[int]], list[str]]:
    """Return groups of constants, the weights of linear layers that go together, and near misses."""
    uses = Counter(index for call in program.calls for index in _constants(call))
    uses.update(index for output in program.outputs for kind, index in references(output) if kind == "c")
    together: dict[str, list[int]] = {}
    notes = []
    for call in program.calls:
        if call.target != _LINEAR or call.kwargs:
            continue
        used = _constants(call)
        bias = call.args[2] if len(call.args) > 2 else None
        inputs = [call.args[0], call.args[1]] if bias is None else [call.args[0], call.args[1], bias]
        of_constants = ["c" in value for value in inputs]
        if of_constants != [False, True, True][: len(inputs)] or any(uses[i] > 1 for i in used):
            continue
        weight = program.constants[used[0]]
        if weight.stride != (weight.shape[1], 1):
            notes.append(f"not merged: a linear layer whose weight has the strides {weight.stride}")
            continue
        key = json.dumps([call.args[0], bias is None, weight.dtype, weight.device, weight.aligned, weight.shape[1]])
        together.setdefault(key, []).append(used[0])
    return [group for group in together.values() if len(group) > 1], notes


def _constants(call: Call) -> list[int]:
    arguments = [*call.args, *call.kwargs.values()]
    return [index for argument in arguments for kind, index in references(argument) if kind == "c"]


def _position(merged: Merged, weight: int) -> int:
    """Return where a constant of the program before, not merged yet, is now."""
    return merged.constants.index((weight,))


def _merge(made: Merged, weights: Sequence[int]) -> Merged:
    """Merge the linear layers of these weights, by their positions in `made`."""
    program = made.program
    by_weight = {call.args[1]["c"]: n for n, call in enumerate(program.calls) if call.target == _LINEAR}
    calls = [by_weight[weight] for weight in weights]
    first = program.calls[min(calls)]
    biases = [program.calls[n].args[2]["c"] for n in calls] if len(first.args) > 2 and first.args[2] else []
    stacked: dict[int, tuple[int, ...]] = {weights[0]: tuple(weights)}
    if biases:
        stacked[biases[0]] = tuple(biases)
    gone = {*weights[1:], *biases[1:]}
    kept = [index for index in range(len(program.constants)) if index not in gone]
    number = {old: new for new, old in enumerate(kept)}
    specs = tuple(_stacked(program, stacked[i]) if i in stacked else program.constants[i] for i in kept)
    origins = tuple(sum((made.constants[j] for j in stacked.get(i, (i,))), ()) for i in kept)
    bounds = _bounds([int(program.constants[weight].shape[0]) for weight in weights])
    out: list[Call] = []
    result: dict[int, int] = {}
    whole = -1
    for n, call in enumerate(program.calls):
        if n not in calls:
            out.append(_renumbered(call, result, number))
        else:
            if whole < 0:
                bias = ({"c": number[biases[0]]},) if biases else ()
                linear = Call(_LINEAR, (first.args[0], {"c": weights[0]}), {})
                linear = _renumbered(linear, result, number)
                whole = len(out)
                out.append(replace(linear, args=(*linear.args, *bias)))
            begin, end = bounds[calls.index(n)]
            out.append(Call(_SLICE, ({"n": whole}, -1, begin, end), {}))
        result[n] = len(out) - 1
    outputs = tuple(_replaced(output, result, number) for output in program.outputs)
    return Merged(replace(program, constants=specs, calls=tuple(out), outputs=outputs), origins)


def _stacked(program: Program, constants: Sequence[int]) -> TensorSpec:
    specs = [program.constants[index] for index in constants]
    rows = sum(int(spec.shape[0]) for spec in specs)
    return replace(specs[0], shape=(rows, *specs[0].shape[1:]))


def _bounds(widths: Sequence[int]) -> list[tuple[int, int]]:
    bounds = []
    begin = 0
    for width in widths:
        bounds.append((begin, begin + width))
        begin += width
    return bounds


def _renumbered(call: Call, results: Mapping[int, int], constants: Mapping[int, int]) -> Call:
    args = tuple(_replaced(argument, results, constants) for argument in call.args)
    return Call(call.target, args, {k: _replaced(v, results, constants) for k, v in call.kwargs.items()})


def _replaced(value: Any, results: Mapping[int, int], constants: Mapping[int, int]) -> Any:
    if isinstance(value, Mapping):
        if "n" in value:
            return {**value, "n": results[value["n"]]}
        return {**value, "c": constants[value["c"]]} if "c" in value else value
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(item, results, constants) for item in value)
    return value


def _widths(program: Program, weights: Sequence[int]) -> str:
    return " + ".join(str(program.constants[weight].shape[0]) for weight in weights)
