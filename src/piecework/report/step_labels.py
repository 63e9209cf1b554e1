"""A short name for every step of a plan, as profiler traces show it: its piece or opaque op, and its layers."""

from __future__ import annotations

from dataclasses import replace

from piecework.bundle.plan import OpStep, Plan
from piecework.report.layers import LayerStack, find_stacks, step_names
from piecework.report.spelling import spell_numbers

_FINGERPRINT_DIGITS = 8


def step_labels(plan: Plan) -> tuple[str, ...]:
    """Return a label per step: "piece 1 [3fa8b2c1] model.layers 3-4", "piecework::attention model.layers.3.self_attn".

    The steps are `plan.all_steps`. Pieces are numbered as `piecework inspect` lists them.
    """
    paths = [replace(plan, variants=(), steps=variant.steps) for variant in plan.variants]
    return tuple(label for path in (*paths, plan) for label in _labels(path))


def _labels(plan: Plan) -> tuple[str, ...]:
    stacks = find_stacks(plan)
    return tuple(" ".join([_what(plan, step), *_where(plan, step, stacks)]) for step in range(len(plan.steps)))


def _what(plan: Plan, step: int) -> str:
    found = plan.steps[step]
    if isinstance(found, OpStep):
        return found.op.removesuffix(".default")
    number = plan.instances[found.instance].piece
    return f"piece {number} [{plan.pieces[number].fingerprint[:_FINGERPRINT_DIGITS]}]"


def _where(plan: Plan, step: int, stacks: tuple[LayerStack, ...]) -> list[str]:
    found = plan.steps[step]
    if isinstance(found, OpStep):
        layers = [a["layer"] for a in (*found.args, *found.kwargs.values()) if "layer" in a]
        if layers:
            return [str(layers[0])]
    held = [f"{stack.name} {spell_numbers(stack.holders[step])}".strip() for stack in stacks if stack.holders[step]]
    # a model's first and last pieces may bind weights of no layer, such as the embedding's
    return held or list(step_names(plan, step)[:1])
