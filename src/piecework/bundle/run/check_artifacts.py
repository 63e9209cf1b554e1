"""Whether a plan uses its artifacts as they say that they are used; nothing is opened before."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from piecework.bundle.check_plan import artifact_for, forms, lie
from piecework.bundle.manifest import corrupt
from piecework.bundle.plan import NativeCall, Plan, UniquePiece
from piecework.bundle.run.abstract_run import run_abstractly
from piecework.bundle.run.instances import Library, read_library
from piecework.foundation.notes import INTERFACE, read_note
from piecework.ops.ir.call_form import TensorForm
from piecework.ops.ir.interface import Interface


def check_artifacts(plan: Plan, path_of: Callable[[str], Path], *, seed: str) -> Mapping[str, Library]:
    """Return a plan's artifacts by name, those of bodies inside opaque ops included, but for kernels.

    Args:
        plan: one that `check_plan` took.
        path_of: returns the file of an artifact.
        seed: what the sizes depend on at which the plan is looked at (run/sample_sizes.py).

    Raises CorruptBundle where an artifact is used otherwise than it says, or is another one than the plan names.
    """
    bodies = [native.piece for native in plan.natives if native.piece is not None]
    pieces = [*plan.pieces, *bodies]
    names = dict.fromkeys(form.artifact for piece in pieces for form in piece.ranges)
    libraries = {name: read_library(path_of(name), name=name) for name in names}
    for piece in pieces:
        _check_programs(piece, libraries)
    for native in plan.natives:
        _check_body(native, libraries)
    for name, artifact in plan.kernels.items():
        _check_kernel(name, path_of(artifact), artifact=artifact)
    for low, high in forms(plan):
        interfaces = [libraries[artifact_for(piece, low, high)].interface for piece in plan.pieces]
        _check_instances(plan, interfaces)
        for path in plan.forwards:
            try:
                run_abstractly(plan, path, bounds=(low, high), interfaces=interfaces, seed=seed)
            except ValueError as error:
                raise lie(str(error)) from error
    return libraries


def _check_programs(piece: UniquePiece, libraries: Mapping[str, Library]) -> None:
    for form in piece.ranges:
        if libraries[form.artifact].interface.program != piece.program:
            raise lie(f"piece {piece.fingerprint[:12]} has the artifact of another piece")


def _check_instances(plan: Plan, interfaces: Sequence[Interface]) -> None:
    """Check that each instance is bound to constants as its artifact takes them, whether a step runs it or not."""
    for number, instance in enumerate(plan.instances):
        wanted = interfaces[instance.piece]
        recipes = [plan.recipes[index] for index in instance.constants]
        taken = [(c.shape, c.dtype, pack) for c, pack in zip(wanted.constants, wanted.packs, strict=True)]
        if [(recipe.shape, recipe.dtype, recipe.pack) for recipe in recipes] != taken:
            raise lie(f"instance {number} has other constants than its artifact takes")


def _check_body(native: NativeCall, libraries: Mapping[str, Library]) -> None:
    """Check that a body serves the calls that the plan says it serves."""
    if not native.artifact:
        return
    interface = libraries[native.artifact].interface
    tensors = tuple(a.spec() for a in native.form.arguments if isinstance(a, TensorForm))
    declared = {name: (low, high) for name, low, high in interface.symbols}
    same = tensors == interface.inputs and not interface.constants
    if not same or any(declared.get(name) != (low, high) for name, low, high in native.form.sizes):
        raise lie(f"the body for {native.form.text()[:200]} takes something else")


def _check_kernel(name: str, library: Path, *, artifact: str) -> None:
    try:
        note = json.loads(read_note(library, mark=INTERFACE))
    except (ValueError, RecursionError):
        note = None
    if note != {"kernel": name}:
        raise corrupt(f"artifacts/{artifact}", bundle="", found=f"is not the kernel {name}")
