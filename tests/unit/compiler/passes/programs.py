"""Programs of plain functions, as a capture would write them, and how passes are run over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from piecework.bundle.run.eager import EagerRunner
from piecework.compiler.passes.inline import Body, trace_body
from piecework.compiler.passes.pipeline import Passed, Pipeline
from piecework.ops.ir.program import Call, Program, TensorSpec, constant_name
from piecework.spec.passes import PASS_NAMES

ROWS = "s0"
SYMBOLS = ((ROWS, 1, 64),)


def spec(*shape: int | str, dtype: str = "float32") -> TensorSpec:
    """Return a contiguous tensor's description; "s0" is a size of its own."""
    strides: list[int | str] = [1]
    for size in reversed(shape[1:]):
        inner = strides[0]
        strides.insert(0, inner * size if isinstance(inner, int) and isinstance(size, int) else f"{inner}*{size}")
    return TensorSpec(shape, tuple(strides), dtype, "cpu")


def program_of(function: Callable[..., Any], inputs: Sequence[TensorSpec], *, weights: int = 0) -> Program:
    """Return the program of a function of tensors; the last `weights` of them are constants."""
    body = trace_body(function, [{"tensor": given.to_json()} for given in inputs], {}, symbols=SYMBOLS)
    assert isinstance(body, Body), body
    first = len(inputs) - weights

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {"c": value["i"] - first} if value.get("i", -1) >= first else value
        return [renamed(item) for item in value] if isinstance(value, (list, tuple)) else value

    # below functionalization, torch's own rms_norm writes in place here, and not where models are captured
    calls = [
        Call(
            call.target.replace("add_.", "add."),
            tuple(renamed(list(call.args))),
            {name: renamed(value) for name, value in call.kwargs.items()},
        )
        for call in body.calls
    ]
    results = tuple(renamed(list(body.results)))
    return Program(SYMBOLS, tuple(inputs[:first]), tuple(inputs[first:]), tuple(calls), results)


def passed(program: Program, *names: str, strict: bool = True) -> Passed:
    """Run some passes, or all of them; all results keep their strides where `strict`."""
    outputs = frozenset(range(len(program.outputs))) if strict else frozenset()
    return Pipeline(names or PASS_NAMES).run(program, strict_outputs=outputs)


def targets(program: Program) -> list[str]:
    """Return the operators that a program calls."""
    return [call.target for call in program.calls]


def ops_of(made: Passed) -> list[str]:
    """Return the IR ops that a program calls."""
    found = [t.split(".")[1] for t in targets(made.rewritten.program) if t.startswith("piecework.")]
    return [name for name in found if name != "linear"]


def report(made: Passed, name: str) -> Any:
    """Return what a pass reports."""
    return next(found for found in made.reports if found.name == name)


def values(specs: Sequence[TensorSpec], *, rows: int, seed: int = 0) -> list[Tensor]:
    """Return random tensors of descriptions."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn([rows if d == ROWS else int(d) for d in given.shape], generator=generator).to(
            getattr(torch, given.dtype)
        )
        for given in specs
    ]


def assert_same_results(before: Program, after: Program) -> None:
    """Run two programs on random values, at several sizes: results have the same bits."""
    assert before.constants == after.constants
    for rows in (1, 2, 5, 64):
        inputs, constants = values(before.inputs, rows=rows), values(before.constants, rows=rows, seed=1)
        made = []
        for program in (before, after):
            runner = EagerRunner(program)
            runner.bind({constant_name(i): tensor for i, tensor in enumerate(constants)})
            made.append(runner.run([tensor.clone() for tensor in inputs]))
        for a, b in zip(*made, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
