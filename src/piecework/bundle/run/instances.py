"""Open instances of artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from piecework.bundle.run.eager import EagerRunner, read_program
from piecework.foundation import torch_private
from piecework.providers.discovery import load_operators


def read_calls(path: Path) -> str:
    """Return what describes the operators that an artifact calls, or ""; their providers are imported.

    Raises OpError where a provider is not installed.
    """
    if path.suffix == ".json":
        return ""
    found = torch_private.read_calls(path)
    load_operators(torch_private.called_operators(found))
    return found


def open_instance(path: Path, *, device: str, calls: str) -> Any:
    """Return an instance of an artifact, with `run(list of tensors)`; `calls` is what `read_calls` gave."""
    if path.suffix == ".json":
        return EagerRunner(read_program(path))
    return torch_private.open_aoti_library(path, device=device, calls=calls)
