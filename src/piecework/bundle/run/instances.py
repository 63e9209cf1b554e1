"""Open instances of artifacts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from piecework.bundle.manifest import corrupt
from piecework.bundle.run.eager import EagerRunner, check_program
from piecework.errors import CorruptBundle
from piecework.foundation import torch_private
from piecework.foundation.notes import INTERFACE, read_note
from piecework.foundation.reading import fields
from piecework.ops.ir.interface import Interface
from piecework.ops.ir.program import Program
from piecework.providers.discovery import load_operators

_EAGER: Final = ".json"


@dataclass(frozen=True)
class Library:
    """An artifact that instances are opened of.

    Attributes:
        path: its file.
        calls: what describes the operators that it calls, or "".
        program: what the eager backend's runs; None for native code.
        interface: what it takes and gives, as it says.
    """

    path: Path
    calls: str
    program: Program | None
    interface: Interface


def read_library(path: Path, *, name: str) -> Library:
    """Read what there is to know of the artifact `name` without opening it.

    Raises CorruptBundle where it doesn't say what it takes and gives.
    """
    try:
        if name.endswith(_EAGER):
            data = fields(json.loads(path.read_bytes()), "an artifact", required=("program", "interface"))
            program, interface = Program.from_json(data["program"]), Interface.from_json(data["interface"])
            check_program(program, interface)
            return Library(path, "", program, interface)
        note = read_note(path, mark=INTERFACE)
        return Library(path, torch_private.read_calls(path), None, Interface.from_json(json.loads(note)))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(name, f"doesn't say what it takes and gives: {error}") from error


def load_calls(library: Library) -> None:
    """Import the providers of the operators that a library calls. Raises OpError where one is not installed."""
    if library.program is None:
        load_operators(torch_private.called_operators(library.calls))
    else:
        load_operators(call.target for call in library.program.calls)


def open_instance(library: Library, *, device: str) -> Any:
    """Return an instance, with `run(list of tensors)`. Raises CorruptBundle where it can't be opened."""
    if library.program is not None:
        return EagerRunner(library.program, library.interface)
    try:
        return torch_private.open_aoti_library(library.path, device=device, calls=library.calls)
    except RuntimeError as error:
        raise _damaged(library.path.name, f"can't be opened: {str(error).splitlines()[0][:200]}") from error


def _damaged(name: str, found: str) -> CorruptBundle:
    return corrupt(name, bundle="", found=found)
