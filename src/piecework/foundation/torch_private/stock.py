"""Torch's own compiler. torch 2.11-2.15; torch/_dynamo/backends/registry.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def stock_inductor(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph as torch.compile does by default."""
    from torch._dynamo.backends.registry import lookup_backend

    compiled: Callable[..., Any] = lookup_backend("inductor")(module, list(inputs))
    return compiled


def is_compiled_module(module: torch.nn.Module) -> bool:
    """Whether `torch.compile` has wrapped a module: then the module itself is its `_orig_mod`."""
    return isinstance(getattr(module, "_orig_mod", None), torch.nn.Module)
