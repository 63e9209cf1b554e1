"""Running artifacts. torch 2.11-2.13; torch/csrc/inductor/aoti_runner/pybind.cpp.

The public `torch._inductor.aoti_load_package` imports Inductor's Python (about 2.5 s), these classes don't.

A library that calls operators of Python needs a description of those calls, which the runner looks for beside it, in a
file of its name (torch/csrc/inductor/aoti_torch/oss_proxy_executor.cpp). An artifact is one file, so the description
lies at the library's end (foundation/notes.py), and is put beside it for the moment in which it is opened.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from piecework.foundation.notes import CALLS, append_note, read_note

_CONVERTS = Path(torch.__file__).parent / "include/torch/csrc/inductor/aoti_torch/generated_enum_converters.h"
_NUMBERS: Mapping[str, Mapping[int, int]] = {
    "as_scalar_type": {n: n - 1 for n in range(1, 13)} | {13: 15, 28: 27, 29: 24, 30: 23, 31: 26, 32: 25},
    "as_memory_format": {1: 0, 2: 2, 3: 3, 4: 1},
    "as_layout": {7: 0},
}
"""Numbers of torch/_export/serde/schema.py → those of c10 (core/ScalarType.h, MemoryFormat.h, Layout.h)."""


def append_calls(library: Path, description: str) -> None:
    """Put the description of a library's calls of operators at its end.

    torch 2.11 writes dtypes with the numbers of exported programs, and its runner takes them for c10's: int8 becomes
    int16. From 2.12 on the runner converts them.
    """
    append_note(library, description if _CONVERTS.exists() else c10_numbers(description), mark=CALLS)


def c10_numbers(description: str) -> str:
    """Return a description of calls with c10's numbers of dtypes, memory formats and layouts."""
    if not any(kind in description for kind in _NUMBERS):
        return description
    described = json.loads(description)
    for node in described["nodes"]:
        for given in node["node"]["inputs"]:
            for kind, value in given["arg"].items():
                if kind in _NUMBERS:
                    given["arg"][kind] = _NUMBERS[kind].get(value, value)
    return json.dumps(described)


def read_calls(library: Path) -> str:
    """Return what `append_calls` put at a library's end, or ""."""
    return read_note(library, mark=CALLS)


def called_operators(description: str) -> tuple[str, ...]:
    """Return the operators ("namespace::name") that a description says are called."""
    nodes = json.loads(description)["nodes"] if description else []
    return tuple(dict.fromkeys(str(node["node"]["target"]) for node in nodes))


def open_aoti_library(path: Path, *, device: str, calls: str = "") -> Any:
    """Open one instance of an AOTInductor shared library on `device` ("cpu" or "cuda"); `run(list) -> list`.

    `calls` is what `read_calls` gave.
    """
    if calls:
        with tempfile.TemporaryDirectory(prefix="piecework-") as folder:
            beside = Path(folder) / "piece.so"
            beside.symlink_to(path.absolute())  # not resolved: it may be a file in memory
            beside.with_suffix(".json").write_text(calls)
            return open_aoti_library(beside, device=device)
    if device == "cpu":
        return torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
    return torch._C._aoti.AOTIModelContainerRunnerCuda(str(path), 1, device, str(path.parent))


def bind_constants(runner: Any, constants: Mapping[str, torch.Tensor]) -> None:
    """Bind `constants` (name → tensor, any layout) to an instance without a copy; the caller keeps them alive."""
    runner.update_constant_buffer(dict(constants), False, True, True)


def pack_linear_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` [out, in] in oneDNN's blocked layout (an opaque mkldnn tensor of the same dtype).

    torch 2.11-2.13: `mkldnn::_reorder_linear_weight`, the op that Inductor's own freezing pass uses.
    """
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed
