"""What an artifact takes and gives: from the program that it is made of, run on tensors without values."""

from __future__ import annotations

from dataclasses import replace

from piecework.bundle.sizes import size_expression
from piecework.compiler.job import Job
from piecework.compiler.rewrite.fakes import run_on_fakes
from piecework.ops.ir.interface import UNKNOWN, Interface
from piecework.ops.ir.program import Dim, TensorSpec


def interface_of(job: Job) -> Interface:
    """Return the interface of the artifact that a job makes."""
    program = job.program
    run = run_on_fakes(program)
    results = [run.sizes.spec(run.decoded(output)) for output in program.outputs]
    return Interface(
        program=program.fingerprint(),
        symbols=tuple((name, *job.ranges.get(name, (low, high))) for name, low, high in program.symbols),
        inputs=program.inputs,
        constants=program.constants,
        packs=tuple(job.pack.get(index, "") for index in range(len(program.constants))),
        results=tuple(_written(spec) for spec in results),
    )


def _written(spec: TensorSpec) -> TensorSpec:
    return replace(spec, shape=tuple(map(_dim, spec.shape)), stride=tuple(map(_dim, spec.stride)))


def _dim(dim: Dim) -> Dim:
    try:
        size_expression(str(dim))
    except ValueError:
        return UNKNOWN
    return dim
