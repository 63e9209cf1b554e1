"""Open instances of artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from piecework.bundle.run.eager import EagerRunner, read_program
from piecework.foundation import torch_private
from piecework.providers.discovery import load_operators

_EAGER: Final = ".json"


def read_calls(path: Path, *, name: str) -> str:
    """Return what describes the operators that the artifact `name` calls, or ""; their providers are imported.

    Raises OpError where a provider is not installed.
    """
    if name.endswith(_EAGER):
        return ""
    found = torch_private.read_calls(path)
    load_operators(torch_private.called_operators(found))
    return found


def open_instance(path: Path, *, name: str, device: str, calls: str) -> Any:
    """Return an instance of the artifact `name`, with `run(list of tensors)`; `calls` is what `read_calls` gave."""
    if name.endswith(_EAGER):
        return EagerRunner(read_program(path))
    return torch_private.open_aoti_library(path, device=device, calls=calls)
