"""A bundle as text: its pieces as they were captured and as they are compiled, its plan, and its fingerprints.

The bundles are the eager backend's, whose artifacts are the compiled programs themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from piecework.bundle.bundle import Bundle
from piecework.bundle.plan import OpStep, Plan, Step
from piecework.ops.ir.program import Program, TensorSpec
from piecework.report.listing import Listing, show_dims, show_operator
from piecework.report.step_labels import step_labels


def print_bundle(bundle: Bundle) -> str:
    """Return everything that a refactor must not change by accident, one thing to a line."""
    plan = Plan.from_json(bundle.plan())
    explained = json.loads((bundle.path / "explain.json").read_text())
    lines = [*_pieces(bundle, plan, explained), *_plan(plan), *_constants(plan)]
    return "\n".join(lines) + "\n"


def _pieces(bundle: Bundle, plan: Plan, explained: Mapping[str, Any]) -> Iterator[str]:
    for number, (piece, data) in enumerate(zip(plan.pieces, explained["pieces"], strict=True)):
        uses = sum(instance.piece == number for instance in plan.instances)
        listing = Listing.from_json(data)
        yield f"piece {number}: {uses} × {piece.fingerprint}"
        yield "  captured"
        yield from _program(listing)
        for report in explained["passes"][number]:
            yield from (f"  pass {report['name']}: {match}" for match in report["matches"])
            yield from (f"  pass {report['name']}: not {miss}" for miss in report["near_misses"])
        for form in piece.ranges:
            artifact = json.loads(bundle.artifact_path(form.artifact).read_text())
            compiled = Program.from_json(artifact["program"])
            yield f"  compiled for {plan.primary} from {form.min} to {form.max}"
            yield from _program(Listing(compiled))
        yield ""


def _program(listing: Listing) -> Iterator[str]:
    program = listing.program
    for name, low, high in program.symbols:
        yield f"    {listing.sizes.get(name, name)}: {low} to {high}"
    for letter, tensors in (("i", program.inputs), ("c", program.constants)):
        yield from (f"    {letter}{index}: {_tensor(spec, listing)}" for index, spec in enumerate(tensors))
    for index, call in enumerate(program.calls):
        named = [f"{key}={_value(value)}" for key, value in sorted(call.kwargs.items())]
        yield f"    n{index} = {show_operator(call)}({', '.join([*map(_value, call.args), *named])})"
    yield f"    returns {', '.join(map(_value, program.outputs))}"


def _tensor(spec: TensorSpec, listing: Listing) -> str:
    aligned = "" if spec.aligned else ", not aligned"
    dims, stride = (show_dims(numbers, listing.sizes) for numbers in (spec.shape, spec.stride))
    return f"{spec.dtype} {dims} by {stride} on {spec.device}{aligned}"


def _value(value: Any) -> str:
    """Write an argument: n3 for a call's result, i0 for an input, c1 for a constant, else what it is."""
    if isinstance(value, Mapping) and len(value) == 1:
        ((tag, held),) = value.items()
        return f"{tag}{held}" if tag in ("n", "i", "c") else f"{tag} {held}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)


def _plan(plan: Plan) -> Iterator[str]:
    yield "plan"
    yield from (f"  {name}: {low} to {high}" for name, (low, high) in plan.sizes.items())
    for slot, given in enumerate(plan.inputs):
        yield f"  slot {slot}: {given.name} {given.size or f'{given.dtype} {show_dims(given.shape or (), {})}'}"
    yield from (f"  state {index}: {s.name} {s.dtype} {show_dims(s.shape, {})}" for index, s in enumerate(plan.states))
    labels = iter(step_labels(plan))
    for variant in plan.variants:
        yield f"  {variant.name}, where {variant.where.text()}"
        yield from (f"    {_step(step, plan)}  # {next(labels)}" for step in variant.steps)
        yield f"    returns slots {_slots(variant.output_slots)} of {variant.num_slots}"
    yield "  all other batches" if plan.variants else "  every batch"
    yield from (f"    {_step(step, plan)}  # {next(labels)}" for step in plan.steps)
    yield f"    returns slots {_slots(plan.output_slots)} of {plan.num_slots} as {json.dumps(plan.structure)}"
    yield ""


def _step(step: Step, plan: Plan) -> str:
    if isinstance(step, OpStep):
        named = [f"{key}={json.dumps(value)}" for key, value in sorted(step.kwargs.items())]
        arguments = ", ".join([*map(json.dumps, step.args), *named])
        return f"slots {_slots(step.outputs)} = {step.op.removesuffix('.default')}({arguments})"
    instance = plan.instances[step.instance]
    constants = f" with {_slots(instance.constants)}" if instance.constants else ""
    return f"slots {_slots(step.outputs)} = piece {instance.piece}({_slots(step.inputs)}){constants}"


def _slots(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _constants(plan: Plan) -> Iterator[str]:
    yield "constants"
    for index, recipe in enumerate(plan.recipes):
        how = [*(["literal"] if recipe.literal else []), *([f"packed {recipe.pack}"] if recipe.pack else [])]
        yield " ".join([f"  {index}: {recipe.name} {recipe.dtype} {show_dims(recipe.shape, {})}", *how])
    yield from (f"  inside opaque ops: {call.form.text()} by {call.provider}" for call in plan.natives)
