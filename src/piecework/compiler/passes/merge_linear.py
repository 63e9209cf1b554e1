"""Linear layers that read the same tensor become one, whose weight is theirs one below the other.

before: a = linear(x, w0); b = linear(x, w1)
after:  m = linear(x, concat(w0, w1)); a = m[..., :n]; b = m[..., n:]

Query, key and value, or gate and up: one larger product reads its input once, waits for its threads once, and at one
token comes nearer to what memory gives. Weights are concatenated by the plan's recipe, at load.

Applies to weights that nothing else uses, of one dtype, either all with a bias or all without; to quantized ones with
their scales and offsets. The results are slices and no longer contiguous, so the pass checks its work: shapes and types
of everything that leaves the piece must be what they were, and strides too where another piece reads it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from piecework.compiler.rewrite.interface import NearMiss, Pass, PassInput, PassResult
from piecework.compiler.rewrite.rewritten import Rewritten
from piecework.compiler.rewrite.verify import same_results
from piecework.ops.ir.program import Call, Program, TensorSpec, references
from piecework.spec.passes import MERGE_LINEAR

_LINEAR = ("piecework.linear.default", "piecework.linear_quantized.default")
_SLICE = "aten.slice.Tensor"


def merge_linear(subject: PassInput) -> PassResult:
    """Merge what can be."""
    before = subject.rewritten
    program = before.program
    made = before
    groups, near_misses = _groups(subject)
    matches: list[str] = []
    for group in groups:
        name = f"{len(group)} linear layers of {_widths(program, group)} outputs"
        candidate = _merge(made, [made.constants.index(before.constants[first]) for first in group])
        wrong = same_results(program, candidate.program, strict_outputs=subject.strict_outputs)
        if wrong is None:
            made = candidate
            matches.append(f"merged {name}")
        else:
            near_misses.append(NearMiss(f"not merged, {name}: {wrong}"))
    return PassResult(made, tuple(matches), tuple(near_misses))


def make_pass() -> Pass:
    """Return the pass."""
    return Pass(MERGE_LINEAR, merge_linear)


def _groups(subject: PassInput) -> tuple[list[list[int]], list[NearMiss]]:
    """Return groups of constants, the weights of linear layers that go together, and near misses."""
    program = subject.rewritten.program
    uses = Counter(index for call in program.calls for index in _constants(call))
    uses.update(index for output in program.outputs for kind, index in references(output) if kind == "c")
    together: dict[str, list[int]] = {}
    near: list[NearMiss] = []
    for number, call in enumerate(program.calls):
        if call.target not in _LINEAR or call.kwargs:
            continue
        used = _constants(call)
        given = [value for value in call.args[1:] if value is not None]
        if "c" in call.args[0] or len(used) != len(given) or any(uses[i] > 1 for i in used):
            continue
        weight = program.constants[used[0]]
        if weight.stride != (weight.shape[1], 1):
            named = subject.named([number])
            near.append(NearMiss(f"not merged, {named}: a linear layer whose weight has the strides {weight.stride}"))
            continue
        specs = [program.constants[i] for i in used]
        alike = [[spec.dtype, spec.device, spec.aligned, spec.shape[1:]] for spec in specs]
        absent = [position for position, value in enumerate(call.args) if value is None]
        key = json.dumps([call.target, call.args[0], absent, alike])
        together.setdefault(key, []).append(used[0])
    return [group for group in together.values() if len(group) > 1], near


def _constants(call: Call) -> list[int]:
    arguments = [*call.args, *call.kwargs.values()]
    return [index for argument in arguments for kind, index in references(argument) if kind == "c"]


def _merge(made: Rewritten, weights: Sequence[int]) -> Rewritten:
    """Merge the linear layers of these weights, by their positions in `made`."""
    program = made.program
    by_weight = {call.args[1].get("c"): n for n, call in enumerate(program.calls) if call.target in _LINEAR}
    calls = [by_weight[weight] for weight in weights]  # in the program's order
    of_calls = zip(*(_constants(program.calls[n]) for n in calls), strict=True)
    stacked = {of_each[0]: of_each for of_each in of_calls}
    gone = {index for of_each in stacked.values() for index in of_each[1:]}
    kept = [index for index in range(len(program.constants)) if index not in gone]
    number = {old: new for new, old in enumerate(kept)}
    specs = tuple(_stacked(program, stacked[i]) if i in stacked else program.constants[i] for i in kept)
    constants = tuple(sum((made.constants[j] for j in stacked.get(i, (i,))), ()) for i in kept)
    bounds = _bounds([int(program.constants[weight].shape[0]) for weight in weights])
    out: list[Call] = []
    made_of: list[tuple[int, ...]] = []
    result: dict[int, int] = {}
    whole = -1
    for n, call in enumerate(program.calls):
        if n not in calls:
            out.append(_renumbered(call, result, number))
            made_of.append(made.origins[n])
        else:
            if whole < 0:
                whole = len(out)
                out.append(_renumbered(call, result, number))
                made_of.append(tuple(sorted(origin for member in calls for origin in made.origins[member])))
            begin, end = bounds[calls.index(n)]
            out.append(Call(_SLICE, ({"n": whole}, -1, begin, end), {}))
            made_of.append(made.origins[n])
        result[n] = len(out) - 1
    outputs = tuple(_replaced(output, result, number) for output in program.outputs)
    merged = replace(program, constants=specs, calls=tuple(out), outputs=outputs)
    return Rewritten(merged, constants, tuple(made_of))


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
