"""Running artifacts. torch 2.11-2.13; torch/csrc/inductor/aoti_runner/pybind.cpp.

The public `torch._inductor.aoti_load_package` imports Inductor's Python (about 2.5 s), these classes don't.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def open_aoti_library(path: Path, *, device: str) -> Any:
    """Open one instance of an AOTInductor shared library on `device` ("cpu" or "cuda"); `run(list) -> list`."""
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
