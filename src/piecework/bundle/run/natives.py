"""Open the bodies that serve calls of IR ops inside a bundle's opaque ops; they belong to the loaded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from piecework.bundle.plan import NativeCall, Plan
from piecework.bundle.run.instances import load_calls, open_instance, read_library
from piecework.errors import OpError
from piecework.foundation.torch_private import find_overload
from piecework.ops.ir.native_bodies import NativeBodies, NativeBody
from piecework.ops.ir.op import ir_op
from piecework.ops.ir.provider_order import ProviderOrder
from piecework.ops.ir.selection import Selection
from piecework.providers.discovery import load_providers


def open_natives(
    plan: Plan, path_of: Callable[[str], Path], *, order: ProviderOrder
) -> tuple[Mapping[str, Selection], tuple[str, ...]]:
    """Open a plan's bodies.

    Args:
        plan: the plan.
        path_of: returns the file of an artifact.
        order: of providers.

    Returns for each opaque op that has any ("namespace::name") what is selected while it runs; and notes about bodies
    that can't be had here, whose calls run natively instead.
    """
    if not plan.natives:
        return {}, ()
    bodies: list[NativeBody] = []
    notes: list[str] = []
    for native in plan.natives:
        try:
            bodies.append(_open(native, path_of))
        except OpError as error:
            notes.append(f"no body for {native.form.text()}, it runs uncompiled: {error.found}")
    selection = Selection(order, bodies=NativeBodies(order, bodies))
    return {op: selection for native in plan.natives for op in native.ops}, tuple(notes)


def _open(native: NativeCall, path_of: Callable[[str], Path]) -> NativeBody:
    if native.artifact:
        assert native.piece is not None
        library = read_library(path_of(native.artifact), name=native.artifact)
        load_calls(library)
        runner = open_instance(library, device=native.piece.device)
        return NativeBody(native.form, provider=native.provider, run=runner.run)
    if native.piece is not None:
        raise OpError(
            asked=f"open the body of {native.form.text()}",
            found="the bundle has none, because it could not be compiled for all sizes",
            try_="read the notes of its compile",
        )
    absent = load_providers([native.provider]).absent.get(native.provider, "")
    op = ir_op(find_overload(native.form.op))
    implementation = None if op is None else op.implementation(native.provider)
    if implementation is None:
        raise OpError(
            asked=f"call {native.provider}'s {native.form.op}",
            found=absent or "it has no such implementation in this process",
            try_="install the provider, and import the package that defines the op",
        )
    return NativeBody(native.form, provider=native.provider, function=implementation.function)
