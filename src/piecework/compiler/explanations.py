"""What a bundle holds for `piecework explain` and `inspect`: the programs of its unique pieces, with source lines, and
what becomes of them.

Nothing of it reaches a fingerprint, a key, a fact or generated code. Its size doesn't depend on the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from piecework.capture.locations import locations_of, source_of
from piecework.compiler.deduplicate import Deduplicated, Forward, Unique
from piecework.compiler.encode import target_name
from piecework.compiler.passes.lower import CallSite
from piecework.compiler.program_kernels import native_kernels, program_kernels
from piecework.compiler.split import OpaqueCall, Piece
from piecework.foundation.torch_private import operator_arguments, operator_of
from piecework.foundation.traffic import kernels_to_json
from piecework.report.listing import Listing
from piecework.report.subject import Explanation


def explain_pieces(paths: Sequence[Forward], pieces: Deduplicated) -> Explanation:
    """Return the explanation of a model's unique pieces and opaque ops.

    Args:
        paths: its forwards.
        pieces: their unique pieces.
    """
    first: dict[int, tuple[Piece, Forward]] = {}
    for (number, step_number), index in pieces.index_of.items():
        step = paths[number].steps[step_number]
        if index not in first and isinstance(step, Piece):
            first[index] = step, paths[number]
    found = [first[index] for index in range(len(pieces.unique))]
    listings = [
        Listing(
            program=piece.program,
            locations=tuple(locations_of(piece.origins)),
            sizes={new: path.captured.size_names[old] for old, new in piece.symbols.items()},
            arguments=_argument_names(node.target for node in piece.origins),
            primary=piece.symbols.get(path.primary, ""),
        )
        for piece, path in found
    ]
    ops: dict[Any, list[torch.fx.Node]] = {}
    for step in (step for path in paths for step in path.steps):
        if isinstance(step, OpaqueCall):
            ops.setdefault(step.node.target, []).append(step.node)
    names = {target: _op_name(target) for target in ops}
    arguments = {target: [a.name for a in operator_arguments(target)] for target in ops}
    return Explanation(
        listings=tuple(listings),
        op_arguments={names[target]: arguments[target] for target in ops},
        op_locations={names[target]: _distinct(locations_of(nodes)) for target, nodes in ops.items()},
        ir_ops=tuple(
            tuple(_site(site, piece) for site in unique.sites)
            for unique, (piece, _) in zip(pieces.unique, found, strict=True)
        ),
        passes=tuple(tuple(report.to_json() for report in unique.passes) for unique in pieces.unique),
        kernels=tuple(_kernels(unique) for unique in pieces.unique),
    )


def _site(site: CallSite, piece: Piece) -> dict[str, Any]:
    """Return a call of an IR op with the source lines of the calls that it stands for."""
    return {**site.to_json(), "source": source_of(piece.origins[number] for number in site.origins)}


def _kernels(unique: Unique) -> dict[str, Any]:
    stages = {
        "captured": native_kernels(unique.captured),
        "passed": program_kernels(unique.passed),
        "lowered": program_kernels(unique.program),
    }
    return {stage: None if found is None else kernels_to_json(found) for stage, found in stages.items()}


def _distinct(locations: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(filter(None, locations)))


def _argument_names(targets: Any) -> dict[str, list[str]]:
    known = {target for target in targets if operator_of(target) is not None}
    return {target_name(target): [a.name for a in operator_arguments(target)] for target in known}


def _op_name(target: object) -> str:
    found = operator_of(target)
    assert found is not None
    return f"{found.name}.{found.overload}"
